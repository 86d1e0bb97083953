"""The one form of every refusal."""

from verl_ext.errors import first_line

__all__ = ["first_line", "refuse"]


def refuse(key: str, value: object, why: str) -> SystemExit:
    """Make the refusal of a value: which key, which value, what is wrong and what to do."""
    return SystemExit(f"{key}={value}: {why}")
