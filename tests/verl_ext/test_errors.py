"""What an exception says, in one line."""

from verl_ext.errors import first_line, last_line


def test_lines_of_an_exception() -> None:
    error = ValueError("\nwhat\nwhere\n")
    assert (first_line(error), last_line(error)) == ("what", "where")


def test_one_without_words_has_its_type() -> None:
    assert first_line(ImportError()) == last_line(ImportError(" \n")) == "ImportError"
