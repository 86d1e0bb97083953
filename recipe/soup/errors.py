"""The one form of every refusal."""


def refuse(key: str, value: object, why: str) -> SystemExit:
    """The one form of all our refusals: which key, which value, what is wrong and what to do."""
    return SystemExit(f"{key}={value}: {why}")


def first_line(error: Exception) -> str:
    """What an exception says, short enough for a refusal."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
