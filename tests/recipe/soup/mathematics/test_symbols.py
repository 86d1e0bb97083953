"""Characters for mathematics become LaTeX; other text stays as it is."""

import unicodedata
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.soup.mathematics.grading import canonical, is_equal
from recipe.soup.mathematics.symbols import in_latex

DIGITS = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) == "Nd"]
FRACTIONS = [chr(code) for code in range(0x2200) if unicodedata.decomposition(chr(code)).startswith("<fraction>")]
ODD = ("\N{FRACTION NUMERATOR ONE}", "\N{VULGAR FRACTION ZERO THIRDS}")
"""One has no denominator; and nobody writes a mixed number with the other."""
WHOLE = [character for character in FRACTIONS if character not in ODD]


@given(st.text(st.characters(max_codepoint=127)))
def test_plain_text_stays_as_it_is(text: str) -> None:
    assert in_latex(text) == text


@given(st.text())
def test_no_text_raises_and_twice_is_once(text: str) -> None:
    once = in_latex(text)
    assert in_latex(once) == once


@pytest.mark.parametrize("character", DIGITS[:: len(DIGITS) // 40])
def test_every_digit_is_one(character: str) -> None:
    assert in_latex(character) == str(unicodedata.decimal(character))


@pytest.mark.parametrize("character", WHOLE)
def test_every_fraction_is_one(character: str) -> None:
    value = Fraction(unicodedata.numeric(character)).limit_denominator(100)
    assert is_equal(character, f"{value.numerator}/{value.denominator}")
    assert is_equal(f"3{character}", f"{3 * value.denominator + value.numerator}/{value.denominator}")


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        ("√2", r"\sqrt{2}"),
        ("2√3", r"2\sqrt{3}"),
        ("√12.5", r"\sqrt{12.5}"),
        ("√(x+1)", r"\sqrt{(x+1)}"),
        ("∛8", r"\sqrt[3]{8}"),
        ("√", "√"),  # of nothing
        ("x²+y³", "x^{2}+y^{3}"),
        ("10⁻¹²", "10^{-12}"),
        ("a₁₂", "a_{12}"),
        ("90°", r"90^\circ "),
        ("90 º", r"90^\circ "),
        ("1\N{FRACTION SLASH}2", "1/2"),
        ("\N{FULLWIDTH LEFT PARENTHESIS}１,２\N{FULLWIDTH RIGHT PARENTHESIS}", "(1,2)"),  # noqa: RUF001
        ("\N{MATHEMATICAL BOLD DIGIT TWO}\N{MATHEMATICAL ITALIC SMALL X}", "2x"),
        ("\N{EN DASH}5", "-5"),
        ("(\N{NON-BREAKING HYPHEN}5, 1)", "(-5, 1)"),
        ("3\N{EN DASH}5", "3\N{EN DASH}5"),  # a range
        ("1\N{NO-BREAK SPACE}234", "1 234"),
        ("1\N{ZERO WIDTH SPACE}2", "12"),
        ("①③", "①③"),  # two choices are not the number 13
        ("Zoë", "Zoë"),
    ],
)
def test_symbols(text: str, latex: str) -> None:
    assert in_latex(text) == latex


def test_an_answer_that_is_only_somewhere_in_the_text() -> None:
    assert is_equal("So it is ½.", "0.5", free=True)
    assert canonical("So it is ½.", free=True) == "0.5"
