"""Refuse a sweep over our config groups (`--multirun algorithm=a,b`), whose jobs nobody would check.

Hydra makes the callbacks of a sweep once, from the config without what is swept. A group that is swept therefore brings
none of its callbacks, and with them go all checks, in silence. Where nothing of a group's is composed only the search
path's plugin still runs.
"""

from collections.abc import Iterable, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser


def refuse_swept_groups(arguments: Sequence[str], groups: Iterable[str]) -> None:
    """Look at a command line.

    Args:
        arguments: `sys.argv` without the program.
        groups: those whose callbacks matter.

    Raises:
        SystemExit: which group, which choices, what to do.
    """
    if not {"-m", "--multirun"} & set(arguments):
        return
    for argument in arguments:
        if any(argument.startswith(f"{group}=") for group in groups):
            [override] = OverridesParser.create().parse_overrides([argument])
            if override.is_sweep_override():
                why = "Hydra makes the callbacks of a sweep without a group that is swept, so nothing would be checked"
                raise SystemExit(f"{argument}: {why}; sweep the keys in it, or start one command for each choice.")
