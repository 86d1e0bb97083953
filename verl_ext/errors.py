"""What an exception says, in one line."""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's words, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def last_line(error: BaseException) -> str:
    """Return the last line of an exception's words, where Ray puts the cause; or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
