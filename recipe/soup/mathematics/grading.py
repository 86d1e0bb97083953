r"""Compare answers by math-verify, and make a text that equal answers share.

`python -m recipe.soup.mathematics.grading` is the process that `reward.py` asks: requests on its standard input and
replies on its standard output, one line of JSON each. math-verify can only stop itself by SIGALRM, which works in a
main thread only, and not inside one long operation on integers, so `\boxed{9^{9^{9^9}}}` would hold up a trainer for
ever (verl-project/verl#5839). Here it is this process that ends, and it is started anew.
"""

import contextlib
import json
import logging
import resource
import signal
import sys
from decimal import Decimal
from functools import lru_cache
from typing import Any

import sympy
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from math_verify.grader import get_pct_val, is_assignment_relation, is_relation, take_last_relation

from recipe.soup.mathematics.cleaning import PERCENT, as_text, base, choice, clean, modulus, several_amounts, words
from recipe.soup.mathematics.symbols import in_latex

SECONDS = 3.0
"""Limit of processor time for one request; an answer usually takes 0.02. Processor time, since what is correct must not
depend on how busy the machine is."""
MEMORY = 4 * 1024**3
"""Limit of the address space, in bytes."""

SMALL = sympy.Rational(1, 1000)
"""Smaller numbers are compared by six significant digits: by math-verify's six decimals 2e-19 would equal 1e-19."""
LONGEST_INTEGER = 10**40


@lru_cache(maxsize=256)
def readings(answer: str, free: bool = False) -> list[Any]:
    r"""Return what math-verify reads: a SymPy object, then its LaTeX as a string; [] if it finds nothing.

    Args:
        answer: an answer; with `free`, a text that has one somewhere.
        free: whether to search the text for the answer.
    """
    no_timeout: Any = None
    if free:
        return parse(answer, [LatexExtractionConfig(), ExprExtractionConfig()], parsing_timeout=no_timeout)
    # Without ExprExtractionConfig: of `1, 2, \ldots, n`, which math-verify does not read as LaTeX, it would take the 2.
    return parse(rf"\boxed{{{answer}}}", [LatexExtractionConfig()], parsing_timeout=no_timeout)


def is_equal(answer: str, truth: str, free: bool = False) -> bool:
    """Whether the answer has the value of the true one.

    math-verify decides about values, and 10 % equals both 10 and 0.1. Words, and several numbers with units, are
    compared as texts. The letter of a choice is enough where one of the two has nothing else.
    """
    truth = clean(truth)
    if free:
        return _same(readings(in_latex(answer), free=True), readings(PERCENT.sub("", truth)))
    answer = clean(answer)
    if answer == truth:
        return True
    (letter, answer), (true_letter, truth) = choice(answer), choice(truth)
    if letter and true_letter and (letter != true_letter or not (answer and truth)):
        return letter == true_letter
    answer, truth = answer or letter or "", truth or true_letter or ""
    (divisor, answer), (true_divisor, truth) = modulus(clean(answer)), modulus(clean(truth))
    if divisor and true_divisor and divisor != true_divisor:
        return False
    if several_amounts(answer) or several_amounts(truth):
        return as_text(answer) == as_text(truth)
    if (text := words(answer)) is not None and (true_text := words(truth)) is not None:
        return as_text(text) == as_text(true_text)
    if base(answer) not in (None, base(truth)):
        return False
    return _is_equal_value(answer, truth)


def _is_equal_value(answer: str, truth: str) -> bool:
    if answer == truth:
        return True
    bare, bare_truth = PERCENT.sub("", answer), PERCENT.sub("", truth)
    if _same(readings(bare), readings(bare_truth)):
        return True
    if (bare == answer) == (bare_truth == truth):
        return False
    hundredth, other = (bare, truth) if bare != answer else (bare_truth, answer)
    return _same(readings(rf"\frac{{{hundredth}}}{{100}}"), readings(other))


def _same(found: list[Any], true: list[Any]) -> bool:
    """Compare by `verify`, but small numbers by their digits; `x > 3` equals the set of its solutions."""
    if not found or not true:
        return False
    number, true_number = _number(_unwrapped(found[0])), _number(_unwrapped(true[0]))
    if number is not None and true_number is not None and min(abs(number), abs(true_number)) < SMALL:
        return _number_text(number) == _number_text(true_number)
    return verify(true, found, allow_set_relation_comp=True, timeout_seconds=None)


def canonical(answer: str, free: bool = False) -> str:
    r"""Return a text that answers of equal value share, if possible: `1/2`, `0.5` and `\frac{1}{2}` give `0.5`.

    Real numbers get six decimals, as math-verify compares them, and six significant digits below `SMALL`. `x=5` becomes
    `5`, and `10\%` becomes `10`. Elements of sets are sorted, polynomials and fractions multiplied out. What cannot be
    read is returned as it is, without spaces; "" if there is nothing.
    """
    if free:
        answer = in_latex(answer)
    else:
        letter, rest = choice(clean(answer))
        answer = modulus(clean(rest))[1] if rest else letter or ""
        if several_amounts(answer):
            return as_text(answer)
        if (text := words(answer)) is not None:
            return text
        answer = PERCENT.sub("", answer)
    found = readings(answer, free)
    try:
        return _text(found[0])
    except Exception:  # SymPy raises all kinds of exceptions on what models write
        return "" if free else "".join(answer.split())


def _unwrapped(value: Any) -> Any:
    """Return `5` for `x=5`."""
    return take_last_relation(value).rhs if is_assignment_relation(value) else value


def _number(value: Any) -> Any:
    """Return a finite real number, its decimals as fractions; None for everything else."""
    if not isinstance(value, sympy.Expr) or not value.is_number:
        return None
    value = value.doit()
    exact = value.xreplace({decimal: sympy.Rational(str(decimal)) for decimal in value.atoms(sympy.Float)})
    return exact if exact.is_extended_real and exact.is_finite else None


def _number_text(number: Any) -> str:
    if number.is_Integer and abs(number) < LONGEST_INTEGER:
        return str(number)
    value = Decimal(str(number.evalf(30)))
    if SMALL <= abs(value) < LONGEST_INTEGER:
        return f"{value:.6f}".rstrip("0").rstrip(".")
    # Large integers may differ in their last digits only.
    return f"{value:.5e}" + (f"...{int(number) % 10**9:09d}" if number.is_Integer else "")


def _text(value: Any) -> str:
    """Return the canonical text of what math-verify has read."""
    value = _unwrapped(value)
    value = get_pct_val(value, value)  # 10 % is 10 here, as in a box
    number = _number(value)
    if number is not None:
        return _number_text(number)
    if isinstance(value, str):
        return "".join(value.split())
    if isinstance(value, sympy.FiniteSet):
        elements = sorted({_text(element) for element in value.args})
        return elements[0] if len(elements) == 1 else "{" + ",".join(elements) + "}"
    if isinstance(value, sympy.Tuple):
        return "(" + ",".join(map(_text, value)) + ")"
    if isinstance(value, sympy.MatrixBase):
        return str([[_text(entry) for entry in row] for row in value.tolist()])
    if isinstance(value, sympy.Interval):
        brackets = "(" if value.left_open else "[", ")" if value.right_open else "]"
        return f"{brackets[0]}{_text(value.start)},{_text(value.end)}{brackets[1]}"
    if isinstance(value, sympy.Union):
        return "U".join(sorted(map(_text, value.args)))
    if is_relation(value):
        return _relation_text(value)
    if isinstance(value, sympy.Expr):
        value = _multiplied_out(value)
    return "".join(str(value).split())


def _multiplied_out(value: Any) -> Any:
    return sympy.cancel(sympy.together(sympy.nsimplify(value.doit(), rational=True)))


def _relation_text(value: Any) -> str:
    """Write an equation up to a factor, and an inequality in one variable as the set of its solutions."""
    if isinstance(value, sympy.Eq):
        left, right = value.lhs, value.rhs
        difference = _multiplied_out(left - right).as_content_primitive()[1]  # pyright: ignore[reportOperatorIssue]
        return min("".join(str(side).split()) for side in (difference, (-difference).expand())) + "=0"
    with contextlib.suppress(Exception):
        solutions = value.as_set()
        if isinstance(solutions, sympy.Set):
            return _text(solutions)
    return "".join(str(value).split())


def serve() -> None:
    """Answer requests until the standard input ends.

    A request is `{"answer": str, "free": bool, "truth": str}`, and the reply says whether they are equal. Without
    `truth` the reply is the answer's canonical text.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that we passed no timeout
    with contextlib.suppress(ValueError):  # a stricter limit is there already
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    replies, sys.stdout = sys.stdout, sys.stderr  # what a library prints must not get between the replies
    print(json.dumps("ready"), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # SIGPROF ends the process, whatever it is doing
        try:
            reply: Any = is_equal(**request) if "truth" in request else canonical(**request)
        except Exception:  # as above
            reply = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    serve()
