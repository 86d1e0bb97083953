"""What an exception says, in one line."""

from verl_ext.errors import first_line, last_line, root_cause


def test_lines_of_an_exception() -> None:
    error = ValueError("\nwhat\nwhere\n")
    assert (first_line(error), last_line(error)) == ("what", "where")


def test_one_without_words_has_its_type() -> None:
    assert first_line(ImportError()) == last_line(ImportError(" \n")) == "ImportError"


def test_the_root_of_a_chain() -> None:
    first = ValueError("first")
    second, third = KeyError("second"), RuntimeError("third")
    second.__cause__, third.__cause__ = first, second
    assert root_cause(third) is root_cause(first) is first
