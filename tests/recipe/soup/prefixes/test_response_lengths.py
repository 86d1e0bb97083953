"""How long a prompt's responses typically are: its last visit, else the run's moving mean."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe.soup.prefixes.response_lengths import TYPICAL_FILE, TypicalLengths


def test_before_the_first_step_half_of_what_is_allowed_is_guessed() -> None:
    assert TypicalLengths(24)(5) == 12


def test_a_prompt_has_the_mean_of_its_last_visit() -> None:
    lengths = TypicalLengths(24)
    lengths.add([(1, 4), (2, 10), (1, 8), (2, 12)])
    assert (lengths(1), lengths(2)) == (6, 11)
    lengths.add([(1, 20)])
    assert (lengths(1), lengths(2)) == (20, 11)


def test_a_prompt_not_seen_before_has_the_runs_moving_mean() -> None:
    lengths = TypicalLengths(1000)
    lengths.add([(1, 10), (2, 40), (2, 40)])
    assert lengths(3) == pytest.approx(30)  # of samples, not of prompts; the guess of 500 is forgotten
    lengths.add([(4, 130)])
    assert lengths(3) == pytest.approx(0.9 * 30 + 0.1 * 130)


def test_a_step_without_responses_changes_nothing() -> None:
    lengths = TypicalLengths(24)
    lengths.add([])
    assert lengths(1) == 12
    lengths.add([(1, 3)])
    lengths.add([])
    assert (lengths(1), lengths(2)) == (3, 3)


def test_responses_may_come_from_a_generator() -> None:
    lengths = TypicalLengths(24)
    lengths.add((prompt, 2 * prompt) for prompt in (1, 3))
    assert (lengths(1), lengths(3), lengths(0)) == (2, 6, 4)


STEPS = st.lists(st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(1, 99)), max_size=6), max_size=5)


@settings(deadline=None)
@given(steps=STEPS, more=STEPS)
def test_a_checkpoint_changes_nothing(
    steps: list[list[tuple[int, int]]], more: list[list[tuple[int, int]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    whole = TypicalLengths(24)
    for responses in steps:
        whole.add(responses)
    whole.save(folder)
    resumed = TypicalLengths(24)
    resumed.load(folder)
    for responses in more:
        whole.add(responses)
        resumed.add(responses)
    prompts = {-1, *(prompt for responses in steps + more for prompt, _ in responses)}
    assert {prompt: whole(prompt) for prompt in prompts} == {prompt: resumed(prompt) for prompt in prompts}


def test_a_checkpoint_without_the_file_leaves_the_guess(tmp_path: Path) -> None:
    lengths = TypicalLengths(24)
    lengths.load(tmp_path)
    assert lengths(1) == 12


def test_the_file_holds_no_pickles(tmp_path: Path) -> None:
    lengths = TypicalLengths(24)
    lengths.add([(1, 4)])
    lengths.save(tmp_path)
    with np.load(tmp_path / TYPICAL_FILE, allow_pickle=False) as arrays:
        assert all(arrays[name].dtype != object for name in arrays)
