from itertools import combinations
from math import comb, sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recipe.soup.algorithm.pass_at_k import pass_at_k_advantages


def by_enumeration(solved: list[bool], k: int) -> list[float]:
    """Each choice of k samples has one reward, whether one of them solves; a sample gets the mean over its choices."""
    choices = list(combinations(range(len(solved)), k))
    rewards = [float(any(solved[i] for i in choice)) for choice in choices]
    mean = sum(rewards) / len(rewards)
    spread = sqrt(mean * (1 - mean))
    if spread == 0:
        return [0.0] * len(solved)
    advantages = []
    for sample in range(len(solved)):
        own = [reward for choice, reward in zip(choices, rewards, strict=True) if sample in choice]
        advantages.append((sum(own) / len(own) - mean) / spread)
    return advantages


@given(st.data())
def test_it_is_the_mean_over_all_choices_that_hold_the_sample(data: st.DataObject) -> None:
    solved = data.draw(st.lists(st.booleans(), min_size=2, max_size=8))
    k = data.draw(st.integers(1, len(solved)))
    rewards = torch.tensor([float(is_solved) for is_solved in solved], dtype=torch.float64)
    mine = pass_at_k_advantages(rewards, ["a"] * len(solved), k)
    assert mine.tolist() == pytest.approx(by_enumeration(solved, k), abs=1e-12)


def test_groups_do_not_touch_and_one_that_lost_samples_has_smaller_choices() -> None:
    rewards = torch.tensor([1.0, 0, 0, 0, 0.5, 0, -1], dtype=torch.float64)
    mine = pass_at_k_advantages(rewards, ["a", "a", "b", "a", "b", "a", "b"], 4)
    assert mine[[0, 1, 3, 5]].tolist() == [0, 0, 0, 0]  # the only choice of four is solved
    assert mine[[4, 2, 6]].tolist() == pytest.approx(by_enumeration([True, False, False], 3))


def test_one_sample_at_a_time_is_grpo() -> None:
    rewards = torch.tensor([1.0, 0, 0, 1, 0], dtype=torch.float64)
    expected = (rewards - rewards.mean()) / rewards.std(correction=0)
    assert torch.allclose(pass_at_k_advantages(rewards, ["a"] * 5, 1), expected)


def test_a_rare_success_counts_more_than_a_common_one() -> None:
    """Where most samples solve, pass@k has little to gain: a success among eight is worth more than one of six."""
    few, many = (pass_at_k_advantages(torch.tensor([1.0] * n + [0.0] * (8 - n)), ["a"] * 8, 4) for n in (1, 4))
    assert few[0] > many[0] == pytest.approx(sqrt(1 / (comb(8, 4) - 1)))
