"""The one form of every refusal."""

from verl_ext.errors import first_line, last_line, root_cause

__all__ = ["first_line", "last_line", "refuse", "root_cause"]


def refuse(key: str, value: object, why: str) -> SystemExit:
    """Make the refusal of a value: which key, which value, what is wrong and what to do."""
    return SystemExit(f"{key}={value}: {why}")
