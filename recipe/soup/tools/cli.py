"""The console command `soup-verl`; `soup` is its older name."""

import argparse
import os
import sys
from collections.abc import Sequence
from errno import EDQUOT, ENOSPC
from io import TextIOWrapper
from pkgutil import resolve_name

from recipe.soup.errors import refuse

COMMANDS = {
    "compare": ("recipe.soup.tools.compare.run:compare", "run configurations x seeds, and report"),
    "doctor": ("recipe.soup.tools.doctor.run:doctor", "say what would keep a run from starting here"),
    "eval": ("recipe.soup.tools.evaluate.run:evaluate", "sample a checkpoint on benchmarks, and grade it"),
    "plot": ("recipe.soup.tools.plot:plot", "draw a run"),
    "show": ("recipe.soup.tools.show:show", "print a run's samples, history and tools in colours"),
    "summary": ("recipe.soup.tools.summary:print_summaries", "say in a few lines what a run did"),
    "verify": ("recipe.soup.tools.verify:check_run", "recompute a run's old log-probs with plain transformers"),
}
"""By name: what to call, in a module that has `add_arguments` and `EXAMPLES`, and a line of help."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line (or `arguments`, without the program's name), and do what it says."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="soup-verl", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, (place, line) in COMMANDS.items():
        # Only the chosen command's module is imported: torch and transformers take seconds.
        if given[:1] == [name]:
            call = resolve_name(place)
            module = sys.modules[call.__module__]
            command = commands.add_parser(
                name,
                help=line,
                description=call.__doc__,
                epilog=module.EXAMPLES,
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
            module.add_arguments(command)
            command.set_defaults(call=call)
        else:
            commands.add_parser(name, help=line)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # Samples and names may have what the terminal's encoding has not.
            stream.reconfigure(errors="backslashreplace")
    args = parser.parse_args(given)
    try:
        args.call(args)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # a folder that is somebody else's, a disk that is full, which names no file
        if error.filename is None and error.errno not in (ENOSPC, EDQUOT):
            raise
        raise refuse("file", error.filename or "?", f"{error.strerror}.") from error


if __name__ == "__main__":
    main()
