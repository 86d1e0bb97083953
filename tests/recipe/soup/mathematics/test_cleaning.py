"""What is rewritten before math-verify compares, and what is compared as text: answers as models write them."""

import time

import pytest
from grading_cases import CASES
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe.soup.mathematics.boxed import last_box
from recipe.soup.mathematics.cleaning import choice, clean, several_amounts
from recipe.soup.mathematics.grading import canonical, is_equal
from recipe.soup.mathematics.reward import compute_score

NOT_SEEN = {(r"\boxed{\frac{1}{\sqrt{n}}}", r"\sqrt{1/n}")}
"""Right, and scored 0: equal for positive n only, which nobody told."""


@pytest.mark.parametrize(("response", "truth", "deserved"), CASES)
def test_the_score_that_it_deserves(response: str, truth: str, deserved: int) -> None:
    expected = 0 if (response, truth) in NOT_SEEN else deserved
    assert compute_score("", response, truth)["score"] == expected


RIGHT = [
    # The letter of a choice before its value.
    (r"\textbf{(C)}\ 12", "12"),
    (r"\textbf{(C) }12", "12"),
    (r"\text{(C) 12}", "12"),
    (r"(\textbf{C})\ 12", "12"),
    (r"\mathrm{(C)}\ \frac{1}{2}", "0.5"),
    ("(C) 12", "12"),
    ("12", r"\textbf{(C)}\ 12"),
    (r"\textbf{(C)}\ 12", "C"),
    ("C", r"\textbf{(C)}\ 12"),
    ("c", "C"),
    (r"\textbf{(C)}\ 12", r"(C) \frac{24}{2}"),
    # Spaces of all kinds.
    (r"1,\ 2", "1,2"),
    (r"\ 12\ ", "12"),
    ("12~cm", "12"),
    (r"12\quad", "12"),
    (r"1\ \text{and}\ 2", "1,2"),
    # Mixed numbers and words that count.
    ("3 1/2", "3.5"),
    (r"3\ \frac12", "3.5"),
    ("-3 1/2", "-3.5"),
    ("2 and a half", "2.5"),
    (r"2\text{ and a half hours}", "2.5"),
    ("12 million", "12000000"),
    (r"1.5\text{ million dollars}", "1500000"),
    (r"\$3 \text{ thousand}", "3000"),
    # Several amounts, the same in another form.
    (r"3\text{ hours and }20\text{ minutes}", "3 hours 20 minutes"),
    (r"3\text{ hours},\ 20\text{ minutes}", r"3 \text{ hours and } 20 \text{ minutes}"),
    (r"3\text{R}2", r"3\text{ R }2"),
    # One amount, whatever stands in its unit's exponent.
    (r"5\text{ cm}^2", "5"),
    (r"10\text{ m/s}^{2}", "10"),
    # Words.
    ("No", r"\text{No}"),
    (r"\text{None}", "none"),
    ("ab", "ba"),
    # Moduli and bases.
    (r"5 \pmod{7}", "5"),
    (r"x \equiv 5 \pmod 7", r"x \equiv 5 \pmod{7}"),
    ("1010", "1010_2"),
    ("1010_{2}", "1010_2"),
    ("10\N{SUBSCRIPT TWO}", "10_2"),
    (r"\varnothing", r"\emptyset"),
]
WRONG = [
    (r"\textbf{(C)}\ 12", "13"),
    (r"\textbf{(C)}\ 12", "D"),
    (r"\textbf{(C)}\ 12", r"\textbf{(D)}\ 12"),
    ("C) 12", "12"),
    ("(A)(B)", "B"),
    (r"(A) \cup (B)", "B"),
    (r"1\ 2", "12"),
    ("3 1/2", "1.5"),
    ("2 and a half", "2"),
    ("12 million", "12"),
    ("12 dozen", "12"),
    (r"3\text{ hours and }20\text{ minutes}", "3"),
    (r"3\text{ hours and }20\text{ minutes}", "20"),
    ("3 hours 20 minutes", "3"),
    (r"5\text{ feet }6\text{ inches}", "5"),
    (r"5\text{ ft}\text{ and }6\text{ in}", "5"),
    (r"5\text{ cm}, 6\text{ in}", "5"),
    (r"5\text{ h }+20\text{ min}", "5"),
    (r"3 \text{ R } 2", "3"),
    (r"\frac{1}{2}\text{ of }4", "0.5"),
    ("3", r"3\text{ hours and }20\text{ minutes}"),
    ("no", "on"),
    ("On", r"\text{No}"),
    ("None", "neon"),
    ("seat", "east"),
    ("evil", r"\text{live}"),
    (r"5 \pmod 7", r"5 \pmod 8"),
    (r"12 \pmod 7", "5"),
    ("10_3", "10_2"),
    ("10_2", "10"),
    ("3\N{EN DASH}5", "-2"),
    ("", "None"),
    ("None", ""),
]


@pytest.mark.parametrize(("answer", "truth"), RIGHT)
def test_right(answer: str, truth: str) -> None:
    assert is_equal(answer, truth)


@pytest.mark.parametrize(("answer", "truth"), WRONG)
def test_wrong(answer: str, truth: str) -> None:
    assert not is_equal(answer, truth)


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_without_a_true_answer_nothing_is_right(missing: object) -> None:
    for answer in ("None", "nan", r"\text{None}", "5"):
        assert compute_score("", rf"\boxed{{{answer}}}", missing)["score"] == 0


def test_majorities_see_through_the_forms() -> None:
    assert canonical(r"\textbf{(C)}\ 12") == canonical("12") == "12"
    assert canonical(r"3\text{ hours and }20\text{ minutes}") == canonical(r"3\text{ hours},20\text{ minutes}")


def test_a_choice_and_its_value() -> None:
    assert choice(r"\textbf{(C)}\ 12") == ("C", "12")
    assert choice(r"\text{(C)}") == ("C", "")
    assert choice("12") == (None, "12")


@pytest.mark.parametrize("between", [", ", r"\ ", r",\ ", r" \text{ and } ", r"\quad ", "~"])
def test_boxes_side_by_side_are_one_answer(between: str) -> None:
    assert last_box(rf"\boxed{{a=1}}{between}\boxed{{b=2}}") == "a=1, b=2"
    assert compute_score("", rf"\boxed{{a=1}}{between}\boxed{{b=2}}", "1,2")["score"] == 1


PIECES = ["\\", " ", "~", ",", r"\ ", r"\quad", r"\text{ h }", r"\textbf{(C)}", "3", "}", "{", "and", "$", r"\pmod"]


@settings(max_examples=30)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=3).map("".join), st.sampled_from(["", "x", "3"]))
def test_no_answer_takes_long(piece: str, end: str) -> None:
    """A pattern that can match the same spaces in two ways takes for ever on many of them."""
    answer, start = (piece * 250)[:500] + end, time.process_time()
    several_amounts(clean(answer))
    choice(answer)
    assert time.process_time() - start < 1
    last_box(rf"\boxed{{1}}{piece * 20_000}\boxed{{2}}")
    assert time.process_time() - start < 5
