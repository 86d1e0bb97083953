"""The console command `soup`."""

import argparse
from collections.abc import Callable
from typing import Any

import recipe.soup.tools.compare.run as comparing
import recipe.soup.tools.evaluate.run as evaluating
import recipe.soup.tools.plot as plotting
import recipe.soup.tools.show as showing

COMMANDS: dict[str, tuple[Any, Callable[[argparse.Namespace], None], str]] = {
    "compare": (comparing, comparing.compare, "run configurations x seeds, and report"),
    "eval": (evaluating, evaluating.evaluate, "sample a checkpoint on benchmarks, and grade it"),
    "plot": (plotting, plotting.plot, "draw a run"),
    "show": (showing, showing.show, "print a run's samples, history in another colour"),
}
"""By name: the module, which has `add_arguments` and `EXAMPLES`, what to call, and a line of help."""


def main() -> None:
    """Read the command line, and do it."""
    parser = argparse.ArgumentParser(prog="soup", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for name, (module, call, line) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=line,
            description=call.__doc__,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(call=call)
    args = parser.parse_args()
    args.call(args)


if __name__ == "__main__":
    main()
