"""What an exception says, in one line."""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's words, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def root_cause(error: BaseException) -> BaseException:
    """Return the exception at the beginning of a chain (`raise ... from ...`)."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def last_line(error: BaseException) -> str:
    """Return the last line of an exception's words, where Ray puts the cause; or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
