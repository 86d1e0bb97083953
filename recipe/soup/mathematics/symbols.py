r"""Write characters that stand for mathematics (`½`, `√2`, `x²`, `90°`, wide digits) in LaTeX, for math-verify."""

import re
import unicodedata

SYMBOLS = {
    "\N{MINUS SIGN}": "-",
    "\N{MULTIPLICATION SIGN}": r"\times ",
    "\N{MIDDLE DOT}": r"\cdot ",
    "\N{DOT OPERATOR}": r"\cdot ",
    "\N{FRACTION SLASH}": "/",
    "\N{INFINITY}": r"\infty ",
    "\N{UNION}": r"\cup ",
    "\N{INTERSECTION}": r"\cap ",
    "\N{ELEMENT OF}": r"\in ",
    "\N{IDENTICAL TO}": r"\equiv ",
    "\N{HORIZONTAL ELLIPSIS}": r"\ldots ",
    "\N{PRIME}": "'",
    "\N{IDEOGRAPHIC COMMA}": ", ",
    "\N{IDEOGRAPHIC FULL STOP}": ".",
}
"""What math-verify does not read by itself; it reads `π`, `≤`, `±` and `∅`."""
ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}

FULL_WIDTH = ("\uff01", "\uff5e")
STYLED = ("\U0001d400", "\U0001d7ff")
"""Bold, slanted and other letters and digits."""

NOT_ASCII = re.compile(r"[^\x00-\x7f]")
RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ]+")
LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙ]+")
DEGREES = re.compile(r"\s*[°º˚]")
ROOT = re.compile(r"([√∛∜])\s*(\d+(?:\.\d+)?|[A-Za-z]|\\[a-z]+|\([^()]*\)|\{[^{}]*\})")
# Elsewhere a hyphen or dash may mean a range: from 3 to 5 is not -2.
SIGN = re.compile(r"(^|[(\[{,=])(\s*)[\u2010\u2011\u2013](?=[\d.\\])")


def in_latex(text: str) -> str:
    """Return the text with such characters in LaTeX; those that are unknown here stay as they are."""
    text = RAISED.sub(lambda match: "^{" + unicodedata.normalize("NFKC", match[0]) + "}", text)
    text = LOWERED.sub(lambda match: "_{" + unicodedata.normalize("NFKC", match[0]) + "}", text)
    text = NOT_ASCII.sub(lambda match: _simple(match[0]), DEGREES.sub(r"^\\circ ", text))
    text = ROOT.sub(lambda match: ROOTS[match[1]] + "{" + match[2].strip("{}") + "}", text)
    return SIGN.sub(r"\1\2-", text)


def _simple(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Nd":
        return str(unicodedata.decimal(character))
    if category == "Zs":
        return " "
    if category == "Cf":  # has no width: joiners, marks of direction
        return ""
    plain = unicodedata.normalize("NFKC", character)
    top, slash, bottom = plain.partition("\N{FRACTION SLASH}")
    if slash and top and bottom:
        return rf"\frac{{{top}}}{{{bottom}}}"
    styled = any(first <= character <= last for first, last in (FULL_WIDTH, STYLED))
    return plain if styled else SYMBOLS.get(character, character)
