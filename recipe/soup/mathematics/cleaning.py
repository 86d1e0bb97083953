r"""Rewrite what does not change an answer's value but misleads math-verify; and tell what an answer is beside a value.

Pure Python: `grading.py` compares.
"""

import re

from recipe.soup.mathematics.symbols import in_latex

GAP = r"(?:\s|~|\\[,;:! ]|\\q?quad(?![A-Za-z]))"
"""A space, in one of the ways of LaTeX."""
FONTS = r"\\(?:text|mathrm|textbf|mathbf|textit|mbox)"

DOLLAR = re.compile(r"(?<!\\)\$")
OUTER = re.compile(rf"^{GAP}+|(?:\\[,;:!]|\\q?quad|[\s~\\])+$")
THOUSANDS = re.compile(r"(?<=\d)(?:\\[,;:! ]|~|\s)+(?=\d{3}(?!\d))")
# math-verify reads the e of 4.5e33, which MinervaMath's answers have, as Euler's number.
SCIENTIFIC = re.compile(r"(?<=\d)[eE]([+-]?\d+)(?![\w.])")
# It multiplies the 3 of `3 1/2` by the half, but not that of `3\frac{1}{2}`.
MIXED_NUMBER = re.compile(r"(-?\d+)\s+(\d+)\s*/\s*(\d+)")
# math-verify knows units, but only short ones if they are in plain letters.
AMOUNT = re.compile(r"(-?[\d.,]*\d)\s+(?!percent)[A-Za-z]{3,}[A-Za-z ]*")
# Words after a number that are no unit: they change the value.
SCALES = {"hundred": "100", "thousand": "10^3", "million": "10^6", "billion": "10^9", "trillion": "10^{12}"}
SCALES |= {"dozen": "12"}
PARTS = {"half": "2", "third": "3", "quarter": "4"}
COUNTED = re.compile(
    rf"((?:\\?\$)?-?[\d.,]*\d){GAP}*(?:{FONTS}\s*\{{)?\s*"
    rf"(?:({'|'.join(SCALES)})|and a ({'|'.join(PARTS)}))\b[A-Za-z ]*\}}?"
)
PERCENT = re.compile(r"\s*(?:\\?%|\\(?:text|mathrm)\{\s*(?:\\?%|percent)\s*\}|percent)$")
TEXT = re.compile(rf"{FONTS}\s*\{{([^{{}}]*)\}}")
# math-verify would read these letter by letter, as a product of variables.
WORDS = re.compile(r"[A-Za-z][A-Za-z ]*[A-Za-z]")
WORDS_OF_TWO = ("no", "on")
"""Other answers of two letters are products: ab equals ba."""

CHOICE = re.compile(rf"(?:{FONTS}\s*\{{\s*)?\(\s*(?:{FONTS}\s*\{{)?([A-J])\}}?\s*\)(?P<end>{GAP}*\}})?(?P<gap>{GAP}*)")
CHOSEN = re.compile(r"-?[\d.]|[A-Za-z]|-?\\(?:[dt]?frac|sqrt|pi|text|mathrm|\$)")
BASE = re.compile(r"\d[\dA-F]*_\{?(\d+)\}?")
MODULUS = re.compile(rf"{GAP}*\\pmod\s*(?:\{{([^{{}}]*)\}}|(\w))$")
UNIT = re.compile(rf"(?<=[\d}}]){GAP}*{FONTS}\s*\{{([^{{}}]*)\}}")
EXPONENT = re.compile(r"\^(?:\{[^{}]*\}|-?\d)")
RELATION = re.compile(rf"{GAP}*(?:=|\\(?:approx|equiv)(?![A-Za-z]))")
JOINS = re.compile(rf"(?:{GAP}|[,;])*(?:and|or)?(?:{GAP}|[,;])*")


def clean(answer: str) -> str:
    """Remove or rewrite what does not change the value but misleads math-verify."""
    answer = OUTER.sub("", DOLLAR.sub("", in_latex(answer)))
    answer = OUTER.sub("", THOUSANDS.sub("", answer).replace("~", " ").rstrip(".")).replace(
        r"\varnothing", r"\emptyset"
    )
    if mixed := MIXED_NUMBER.fullmatch(answer):
        return rf"{mixed[1]}\frac{{{mixed[2]}}}{{{mixed[3]}}}"
    if counted := COUNTED.fullmatch(answer):
        scale, part = counted[2], counted[3]
        return rf"{counted[1]} \times {SCALES[scale]}" if scale else rf"{counted[1]}\frac{{1}}{{{PARTS[part]}}}"
    amount = AMOUNT.fullmatch(answer)
    return SCIENTIFIC.sub(r"\\times 10^{\1}", amount[1] if amount else answer)


def words(answer: str) -> str | None:
    r"""Return an answer in words (`\text{Friday}`, `even`) in lower case; None for others and for abbreviations."""
    plain = " ".join(TEXT.sub(r"\1", answer).split()).lower()
    return plain if WORDS.fullmatch(plain) and (len(plain) > 2 or plain in WORDS_OF_TWO) else None


def choice(answer: str) -> tuple[str | None, str]:
    r"""Split `\textbf{(C)}\ 12` in its letter and the rest; of a letter alone, `C` or `(C)`, nothing is left.

    Without a letter the answer is returned as it is.
    """
    if alone := re.fullmatch(r"\(?([A-J])\)?", TEXT.sub(r"\1", answer).strip()):
        return alone[1], ""
    match = CHOICE.match(answer)
    if not match or not (match["end"] or match["gap"]):  # (A)(B) is a product
        return None, answer
    rest = answer[match.end() :]
    opened = match[0].count("{") - match[0].count("}")
    rest = rest.removesuffix("}") if opened else rest  # \text{(C) 12}
    return (match[1], rest) if CHOSEN.match(rest) else (None, answer)


def base(answer: str) -> str | None:
    """Return the base that a number like `1010_2` names."""
    match = BASE.fullmatch("".join(answer.split()))
    return match[1] if match else None


def modulus(answer: str) -> tuple[str | None, str]:
    r"""Split `5 \pmod{7}` in 7 and 5."""
    match = MODULUS.search(answer)
    return ("".join((match[1] or match[2]).split()), answer[: match.start()]) if match else (None, answer)


def several_amounts(answer: str) -> bool:
    r"""Whether numbers follow a unit: of `3\text{ hours and }20\text{ minutes}` math-verify would read the 3."""
    for unit in UNIT.finditer(answer):
        rest = EXPONENT.sub("", answer[unit.end() :])
        if not JOINS.fullmatch(unit[1]) and not RELATION.match(rest) and re.search(r"\d", rest):
            return True
    return False


def as_text(answer: str) -> str:
    """Return what is left when answers are compared by their letters alone."""
    return re.sub(rf"{GAP}|,|\band\b", "", TEXT.sub(r" \1 ", answer)).lower()
