"""Countdown's rules, reward, tokenizer and data."""

import random

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from examples.countdown.reward import compute_score
from examples.countdown.task import Problem, is_solution, random_problem, random_trace
from examples.countdown.tokenizer import build_tokenizer

PROBLEM = Problem((3, 5, 7), 22)


@pytest.mark.parametrize("response", ["3*5=15,15+7=22", "5*3=15,7+15=22"])
def test_accepts_solutions(response: str) -> None:
    assert is_solution(PROBLEM, response)


@pytest.mark.parametrize(
    "response",
    [
        "",
        "22",
        "3*5=15",  # 7 is left over
        "3*5=15,15+7=21",  # wrong arithmetic
        "3*5=15,15+7=22,",  # trailing text
        "3*5=15,3+7=10",  # 3 is used up
        "9+13=22",  # foreign numbers
        "3+5=8,8+7=15",  # another target
        "3*5=15;15+7=22",
        "(3*5)+7=22",
        "__import__('os')",
    ],
)
def test_rejects_everything_else(response: str) -> None:
    assert not is_solution(PROBLEM, response)


def test_a_number_given_twice_may_be_used_twice_but_not_thrice() -> None:
    assert is_solution(Problem((4, 4, 1), 15), "4*4=16,16-1=15")
    assert not is_solution(Problem((4, 1, 1), 15), "4*4=16,16-1=15")


@given(seed=st.integers(0, 10**6), size=st.sampled_from([3, 4]))
def test_a_random_trace_solves_the_problem_that_it_makes(seed: int, size: int) -> None:
    rng = random.Random(seed)
    numbers = random_problem(rng, size).numbers
    trace, value = random_trace(numbers, rng)
    assert is_solution(Problem(numbers, value), trace)
    assert not is_solution(Problem(numbers, value + 1), trace)


@given(text=st.text(alphabet="0123456789+-*=,: ", max_size=30))
def test_no_text_breaks_the_parser(text: str) -> None:
    assert is_solution(PROBLEM, text) in (True, False)


def test_reward_reads_the_dataset_as_it_is_stored(countdown_dir) -> None:  # noqa: ANN001
    row = pd.read_parquet(countdown_dir / "data" / "val.parquet").iloc[0]
    truth = row["reward_model"]["ground_truth"]
    problem = Problem(tuple(truth["numbers"]), truth["target"])
    assert row["prompt"][0]["content"] == problem.prompt
    assert compute_score(row["data_source"], "0+0=0", truth) == 0.0


def test_validation_problems_are_not_trained_on(countdown_dir) -> None:  # noqa: ANN001
    prompts = {
        name: {
            messages[0]["content"] for messages in pd.read_parquet(countdown_dir / "data" / f"{name}.parquet")["prompt"]
        }
        for name in ("train", "val")
    }
    assert not prompts["train"] & prompts["val"]


def test_committed_tokenizer_is_the_one_that_the_code_builds(countdown_dir) -> None:  # noqa: ANN001
    committed, built = AutoTokenizer.from_pretrained(countdown_dir / "base_model"), build_tokenizer()
    assert committed.get_vocab() == built.get_vocab()
    text = "3*5=15,15+7=22"
    ids = committed(text)["input_ids"]
    assert len(ids) == len(text)
    assert committed.decode(ids + [committed.eos_token_id], skip_special_tokens=True) == text
