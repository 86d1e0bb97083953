"""Which answers are equal, which text stands for them, and that no response stops the grading."""

import multiprocessing
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from verl.trainer.ppo.metric_utils import process_validation_metrics

from recipe.soup.mathematics import reward as math_reward
from recipe.soup.mathematics.boxed import LONGEST, last_box
from recipe.soup.mathematics.reward import LONGEST_PRED, TAIL, Grader, compute_score


def grade(response: str, truth: str) -> tuple[float, str]:
    result = compute_score("math500", response, truth)
    assert set(result) == {"score", "acc", "pred"}
    assert result["score"] == result["acc"]
    return result["score"], result["pred"]


def boxed(answer: str) -> str:
    return rf"We add them and get \boxed{{{answer}}}."


# ------------------------------------------------------------------------------------------------- what is equal

SAME = {
    "0.5": [r"\frac{1}{2}", "1/2", "0.5", ".5", r"\dfrac12", r"\frac{2}{4}", "0.50", r"$\tfrac{1}{2}$", r"x = \frac12"],
    "-0.333333": [r"-\frac{1}{3}", r"\frac{-1}{3}", "-1/3", "-0.333333"],
    "2.5": [r"2\frac{1}{2}", r"\frac{5}{2}", "2.5"],
    "27": [
        "27",
        "27.0",
        "27.",
        r"27\text{ miles}",
        "27 cm",
        r"\$27",
        "27 dollars",
        r"27^\circ",
        r"27\%",
        "x=27",
        r"3^3",
    ],
    "1080": ["1,080", "1080", "1 080", r"1\,080", r"1{,}080", r"1,\!080"],
    "1.414214": [r"\sqrt{2}", r"\sqrt2", r"\frac{2}{\sqrt{2}}", "1.414214"],
    "4500000000000000000000000000000000": ["4.5e33", r"4.5 \times 10^{33}", r"4.5\cdot 10^{33}", "4.5E+33"],
    "1.60000e-19": ["1.6e-19", r"1.6 \times 10^{-19}", r"16 \times 10^{-20}"],
    f"1.92624e+609...{(2**2024 - 1) % 10**9:09d}": ["2^{2024}-1", "4^{1012}-1"],
    f"1.92624e+609...{(2**2024 + 1) % 10**9:09d}": ["2^{2024}+1"],
    "{1,2}": ["1,2", "2, 1", r"\{1, 2\}", r"1 \text{ and } 2", r"2\text{ or }1", r"x=1, x=2"],
    "{-2,2}": [r"\pm 2", r"-2, 2"],
    "{(1,8,19),(2,7,13)}": ["(1,8,19), (2,7,13)", "(2,7,13),(1,8,19)"],
    "(1,2)": ["(1,2)", r"\left(1, 2\right)", r"(1, \frac{4}{2})"],
    "(1,2,3)": ["(1,2,3)", r"\left( 1,\ 2,\ 3 \right)"],
    "[1,2.5)": [r"[1,\frac{5}{2})", r"\left[1, 2.5\right)"],
    "(-oo,3)U[5,oo)": [r"(-\infty,3)\cup[5,\infty)", r"[5,\infty) \cup (-\infty, 3)"],
    "(3,oo)": ["x > 3", "3 < x", r"(3, \infty)"],
    "x**2+2*x+1": ["x^2+2x+1", "(x+1)^2", r"1 + x(x+2)", "y=(1+x)^2"],
    "[['1'], ['2']]": [r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\ \frac{4}{2}\end{bmatrix}"],
    "friday": [r"\text{Friday}", "Friday", r"\textbf{friday}"],
    "no solution": [r"\text{No solution}", "no  solution"],
    "c": ["C", r"\text{(C)}", "(C)"],
}


@pytest.mark.parametrize("pred", SAME)
def test_equal_answers_are_correct_and_share_their_text(pred: str) -> None:
    for answer in SAME[pred]:
        assert grade(boxed(answer), SAME[pred][0]) == (1.0, pred), answer
        assert grade(boxed(SAME[pred][0]), answer)[0] == 1.0, answer


def test_different_answers_are_wrong_and_have_different_texts() -> None:
    for pred, answers in SAME.items():
        for other, others in SAME.items():
            if pred != other and {pred, other} != {"{1,2}", "(1,2)"}:  # math-verify lets parentheses pass for a set
                assert grade(boxed(others[0]), answers[0]) == (0.0, other), (pred, other)


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("0.33", "1/3"),  # six decimals, as math-verify has it
        ("(2,1)", "(1,2)"),
        ("[1,2)", "[1,2]"),
        ("1", "1,2"),
        ("1,2,3", "1,2"),
        ("2e-19", "1e-19"),  # six decimals would make these equal
        ("0.0", "1e-19"),
        ("-5", "5"),
        ("x+1", "x-1"),
        (r"10\%", r"0.1\%"),
        ("seat", r"\text{east}"),
        (r"\text{seat}", r"\text{east}"),
        ("5 or 6", "5"),
        (r"1, 2, \ldots, n", "2"),  # what math-verify cannot read it may not pick from, either
        ("", "5"),
    ],
)
def test_what_is_not_equal_is_wrong(answer: str, truth: str) -> None:
    assert grade(boxed(answer), truth)[0] == 0.0


@pytest.mark.parametrize("answer", [r"50\%", "50", "0.5", r"\frac12", r"50 \text{ percent}", "50%"])
def test_percent_is_the_number_and_a_hundredth_of_it(answer: str) -> None:
    assert grade(boxed(answer), r"50\%")[0] == 1.0


@settings(max_examples=60, deadline=None)
@given(numerator=st.integers(-(10**6), 10**6), twos=st.integers(0, 3), fives=st.integers(0, 3))
def test_a_fraction_its_latex_and_its_decimal_are_one(numerator: int, twos: int, fives: int) -> None:
    denominator = 2**twos * 5**fives
    value = Fraction(numerator, denominator)
    forms = [f"{numerator}/{denominator}", rf"\frac{{{numerator}}}{{{denominator}}}", f"{numerator / denominator:.6f}"]
    results = {grade(boxed(form), f"{value.numerator}/{value.denominator}") for form in forms}
    assert len(results) == 1
    assert results.pop()[0] == 1.0
    assert grade(boxed(forms[0]), str(numerator + denominator))[0] == float(value == numerator + denominator)


# ------------------------------------------------------------------------------------------- where the answer stands


@pytest.mark.parametrize(
    ("response", "truth", "expected"),
    [
        (r"\boxed{1}. No, wait: it is \boxed{2}.", "2", (1.0, "2")),
        (r"\boxed{2}. No, wait: it is \boxed{1}.", "2", (0.0, "1")),
        (r"Either \boxed{1} or \boxed{2}", "2", (0.0, "{1,2}")),  # guesses side by side
        (r"$m=\boxed{1}$, $n=\boxed{2}$", "1, 2", (1.0, "{1,2}")),
        (r"\boxed{2}, that is \boxed{2}", "2", (1.0, "2")),
        (r"\boxed{2}. I was told to use \boxed{}.", "2", (1.0, "2")),
        (r"<think>\boxed{1}</think> So \boxed{2}", "2", (1.0, "2")),
        (r"<think>\boxed{2}</think> I do not know.", "2", (0.0, "")),
        (r"\boxed{2", "2", (0.0, "")),  # cut off: it may go on
        (r"\boxed{1} and so on, \boxed{2", "1", (0.0, "")),
        (r"so \fbox{2}", "2", (1.0, "2")),
        (r"so $\boxed 2$.", "2", (1.0, "2")),
        (r"\boxed{\left\{1,2\right\}}", "1,2", (1.0, "{1,2}")),
        ("The answer is 2.", "2", (1.0, "2")),
        (r"Therefore $x = \frac{1}{2}$", "0.5", (1.0, "0.5")),
        ("so 1+1 = 2", "2", (1.0, "2")),
        ("The answer is 10%.", r"10\%", (1.0, "10")),
        ("2 " + "and so on " * TAIL, "2", (0.0, "")),  # too far from the end
        ("I do not know.", "2", (0.0, "")),
        ("", "2", (0.0, "")),
    ],
)
def test_the_last_answer_counts(response: str, truth: str, expected: tuple[float, str]) -> None:
    assert grade(response, truth) == expected


@given(
    before=st.text(st.characters(exclude_characters="\\"), max_size=30),
    content=st.text(st.characters(exclude_characters="\\{}"), min_size=1, max_size=LONGEST),
    after=st.text(st.characters(exclude_characters="\\"), max_size=30),
)
def test_a_box_holds_what_stands_between_its_braces(before: str, content: str, after: str) -> None:
    assert last_box(rf"{before}\boxed{{{content}}}{after}") == content.strip()
    assert last_box(before + content + after) is None


def test_what_is_too_long_is_no_answer() -> None:
    assert last_box(r"\boxed{" + "1" * LONGEST + "}") == "1" * LONGEST
    assert last_box(r"\boxed{" + "1" * (LONGEST + 1) + "}") == ""


# --------------------------------------------------------------------------------- that nothing stops it, or raises

SNIPPETS = [r"\boxed{", "}", "{", "$", r"\frac", r"\sqrt", "^", "_", "(", "]", "1", "x", "=", r"\text{", " and ", "%"]


@settings(max_examples=60, deadline=None)
@given(response=st.lists(st.sampled_from(SNIPPETS) | st.text(max_size=3), max_size=20).map("".join))
def test_no_text_raises(response: str) -> None:
    score, pred = grade(response, "5")
    assert score in (0.0, 1.0)
    assert isinstance(pred, str)
    pred.encode()


@pytest.mark.parametrize(
    "token", ["5", "$", "$ ", r"\boxed{", r"\boxed{5} ", "(", "</think>", r"\frac{", "\n", "\ud800"]
)
def test_huge_responses_are_graded(token: str) -> None:
    assert len(grade(token * 200_000, "7")[1]) <= LONGEST_PRED


@pytest.mark.parametrize("answer", [r"9^{9^{9^{9}}}", "(x+1)^{100000}"])
def test_what_takes_too_long_is_wrong_and_the_next_is_graded(answer: str) -> None:
    assert grade(boxed(answer), "5") == (0.0, answer)
    assert grade(boxed("5"), "5") == (1.0, "5")


def test_unusual_arguments_are_taken_as_text() -> None:
    assert compute_score("", boxed("5"), 5)["score"] == 1.0
    assert compute_score("", None, "5")["score"] == 0.0  # pyright: ignore[reportArgumentType]
    assert compute_score("", boxed("5"), None)["score"] == 0.0


def test_threads_share_the_grader() -> None:
    before = threading.active_count()
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: grade(boxed(str(i)), str(i // 2 * 2)), range(64)))
    assert results == [(float(i % 2 == 0), str(i)) for i in range(64)]
    assert threading.active_count() <= before  # none hangs


def in_a_fork() -> None:
    assert grade(boxed("1/2"), "0.5") == (1.0, "0.5")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_has_a_grader_of_its_own() -> None:
    assert grade(boxed("5"), "5")[0] == 1.0
    process = multiprocessing.get_context("fork").Process(target=in_a_fork)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert grade(boxed("6"), "6")[0] == 1.0


@pytest.fixture
def grader() -> Iterator[Grader]:
    grader = Grader()
    yield grader
    grader.close()


def test_a_grader_that_was_killed_is_started_anew(grader: Grader) -> None:
    assert grader.ask(answer="5", truth="5.0") is True
    process = grader._process
    assert process is not None
    process.kill()
    process.wait()
    assert grader.ask(answer="5", truth="5.0") is True


def test_without_math_verify_it_says_so(grader: Grader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards of zero for the whole run would be worse than no run."""
    monkeypatch.setattr(math_reward.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="pip install math-verify"):
        grader.ask(answer="5", truth="5")


# ----------------------------------------------------------------------------------------------------- in verl


def test_verl_counts_majorities_over_it() -> None:
    """Half of the responses have the value of the truth, each in another form; apart, two equal ones outvote them."""
    responses = [boxed("1/2"), boxed("0.5"), boxed(r"\frac{1}{2}"), boxed("3"), boxed("3"), ""]
    infos = [compute_score("math500", response, "0.5") for response in responses]
    columns = {key: [info[key] for info in infos] for key in infos[0]}
    n = len(responses)
    metrics = process_validation_metrics(["math500"] * n, ["problem"] * n, columns)["math500"]["acc"]
    assert metrics[f"mean@{n}"] == 0.5
    assert metrics[f"maj@{n}/mean"] > 0.6
