"""Which prefix tokens keep their gradient, against a brute-force choice."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recipe.soup.algorithm.token_weights import behind_an_outlier, highest_entropy, within_second_moment

Place = tuple[int, int]


def places(mask: torch.Tensor) -> list[Place]:
    return [(b, t) for b in range(mask.size(0)) for t in range(mask.size(1)) if mask[b, t]]


def random_prefix(generator: torch.Generator, batch: int = 5, width: int = 6) -> torch.Tensor:
    return torch.arange(width) < torch.randint(0, width + 1, (batch, 1), generator=generator)


# ---------------------------------------------------------------------- highest entropy


@given(seed=st.integers(0, 10**6), share=st.floats(0, 1), levels=st.sampled_from([2, 5, 10**6]))
@example(seed=0, share=0.0, levels=5)
@example(seed=0, share=1.0, levels=5)
@example(seed=0, share=0.5, levels=1)
@settings(deadline=None)
def test_the_highest_entropies_are_kept_and_of_equals_the_first(seed: int, share: float, levels: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    prefix = random_prefix(generator)
    entropy = torch.randint(levels, prefix.shape, generator=generator) / 7.0
    kept = places(highest_entropy(entropy, prefix, share))
    candidates = places(prefix)
    assert abs(len(kept) - share * len(candidates)) <= 0.5
    by_entropy = sorted(candidates, key=lambda place: -entropy[place].item())  # stable: ties stay in order
    assert kept == sorted(by_entropy[: len(kept)])


@given(seed=st.integers(0, 10**6))
@settings(deadline=None)
def test_share_one_keeps_every_prefix_token_and_share_zero_none(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    prefix = random_prefix(generator)
    entropy = torch.rand(prefix.shape, generator=generator)
    assert torch.equal(highest_entropy(entropy, prefix, 1.0), prefix)
    assert not highest_entropy(entropy, prefix, 0.0).any()


@given(seed=st.integers(0, 10**6), shares=st.tuples(st.floats(0, 1), st.floats(0, 1)))
@settings(deadline=None)
def test_a_larger_share_keeps_all_that_a_smaller_one_keeps(seed: int, shares: tuple[float, float]) -> None:
    generator = torch.Generator().manual_seed(seed)
    prefix = random_prefix(generator)
    entropy = torch.randint(4, prefix.shape, generator=generator).float()
    smaller, larger = (highest_entropy(entropy, prefix, share) for share in sorted(shares))
    assert not (smaller & ~larger).any()


def test_entropy_outside_the_prefix_does_not_matter() -> None:
    prefix = torch.tensor([[True, True, False], [False, False, False], [True, False, False]])
    entropy = torch.tensor([[0.1, 0.5, 9.0], [9.0, math.nan, math.inf], [0.3, 9.0, 9.0]])
    assert places(highest_entropy(entropy, prefix, 2 / 3)) == [(0, 1), (2, 0)]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_batch_without_a_prefix_keeps_nothing_by_entropy(share: float) -> None:
    prefix = torch.zeros(3, 4, dtype=torch.bool)
    kept = highest_entropy(torch.rand(3, 4), prefix, share)
    assert kept.shape == prefix.shape
    assert kept.dtype == torch.bool
    assert not kept.any()


# ---------------------------------------------------------------------- second moment


def random_ratios(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-ratios are multiples of 1/8, so that sums of their squares are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    prefix = random_prefix(generator)
    log_ratio = torch.randint(-12, 13, prefix.shape, generator=generator) / 8.0
    advantages = torch.randint(-1, 2, (prefix.size(0), 1), generator=generator).float().expand(prefix.shape)
    return log_ratio, advantages, prefix


def mean_square(log_ratio: torch.Tensor, tokens: list[Place]) -> float:
    return sum(log_ratio[place].item() ** 2 for place in tokens) / len(tokens) if tokens else 0.0


def drives_away(log_ratio: torch.Tensor, advantages: torch.Tensor, place: Place) -> bool:
    """Whether the update makes a ratio above 1 larger, or one below 1 smaller."""
    ratio, a = math.exp(log_ratio[place].item()), advantages[place].item()
    return (ratio > 1 and a > 0) or (ratio < 1 and a < 0)


budgets = st.sampled_from([1e-9, 0.04, 0.125, 0.25, 0.5, 1.0, 10.0])


@given(seed=st.integers(0, 10**6), budget=budgets)
@settings(deadline=None)
def test_the_largest_removable_square_leaves_until_the_mean_fits(seed: int, budget: float) -> None:
    log_ratio, advantages, prefix = random_ratios(seed)
    staying = places(prefix)
    while mean_square(log_ratio, staying) > budget:
        removable = [place for place in staying if drives_away(log_ratio, advantages, place)]
        if not removable:
            break
        staying.remove(max(removable, key=lambda place: log_ratio[place].item() ** 2))
    kept = places(within_second_moment(log_ratio, advantages, prefix, budget))
    assert set(kept) <= set(places(prefix))
    # Which of two equal squares leaves is nobody's business.
    assert sorted(abs(log_ratio[place].item()) for place in kept) == sorted(
        abs(log_ratio[place].item()) for place in staying
    )


@given(seed=st.integers(0, 10**6), budget=budgets)
@settings(deadline=None)
def test_the_mean_fits_unless_only_tokens_are_left_that_cannot_leave(seed: int, budget: float) -> None:
    log_ratio, advantages, prefix = random_ratios(seed)
    kept = places(within_second_moment(log_ratio, advantages, prefix, budget))
    if any(drives_away(log_ratio, advantages, place) for place in kept):
        assert mean_square(log_ratio, kept) <= budget


@given(seed=st.integers(0, 10**6), budget=budgets)
@settings(deadline=None)
def test_no_token_leaves_in_vain(seed: int, budget: float) -> None:
    log_ratio, advantages, prefix = random_ratios(seed)
    kept = places(within_second_moment(log_ratio, advantages, prefix, budget))
    left = set(places(prefix)) - set(kept)
    if left:
        smallest = min(left, key=lambda place: log_ratio[place].item() ** 2)
        assert mean_square(log_ratio, [*kept, smallest]) > budget


@given(seed=st.integers(0, 10**6), budget=budgets)
@settings(deadline=None)
def test_a_token_that_the_update_pulls_back_never_leaves(seed: int, budget: float) -> None:
    log_ratio, advantages, prefix = random_ratios(seed)
    kept = within_second_moment(log_ratio, advantages, prefix, budget)
    for place in places(prefix & ~kept):
        assert drives_away(log_ratio, advantages, place)


def test_the_token_that_leaves_is_the_one_far_away_and_driven_further() -> None:
    log_ratio = torch.tensor([[0.1, 2.0, 1.0], [0.1, -3.0, 5.0]])
    advantages = torch.tensor([[1.0], [1.0]]).expand(2, 3)
    prefix = torch.tensor([[True, True, True], [True, True, False]])
    kept = within_second_moment(log_ratio, advantages, prefix, budget=2.6)
    # (0.01 + 4 + 1 + 0.01 + 9) / 5 is 2.804; without the 4 it is 2.505; the 9 is pulled back.
    assert places(kept) == [(0, 0), (0, 2), (1, 0), (1, 1)]


def test_a_budget_that_the_mean_just_meets_removes_nothing() -> None:
    log_ratio, prefix = torch.tensor([[0.5, 0.5, 1.0, 0.0]]), torch.ones(1, 4, dtype=torch.bool)
    advantages = torch.ones(1, 4)
    assert within_second_moment(log_ratio, advantages, prefix, budget=0.375).all()
    assert places(within_second_moment(log_ratio, advantages, prefix, budget=0.374)) == [(0, 0), (0, 1), (0, 3)]


def test_ratios_outside_the_prefix_do_not_matter() -> None:
    log_ratio, advantages, prefix = random_ratios(1)
    wild = torch.where(prefix, log_ratio, torch.nan)
    expected = within_second_moment(log_ratio, advantages, prefix, 0.25)
    assert 0 < expected.sum() < prefix.sum()
    assert torch.equal(within_second_moment(wild, advantages, prefix, 0.25), expected)


def test_if_nothing_fits_and_all_can_leave_all_leave() -> None:
    everything = torch.ones(2, 2, dtype=torch.bool)
    assert not within_second_moment(torch.ones(2, 2), torch.ones(2, 2), everything, budget=0.04).any()
    assert within_second_moment(torch.ones(2, 2), -torch.ones(2, 2), everything, budget=0.04).all()


def test_a_batch_without_a_prefix_keeps_nothing_by_second_moment() -> None:
    prefix = torch.zeros(3, 4, dtype=torch.bool)
    kept = within_second_moment(torch.ones(3, 4), torch.ones(3, 4), prefix, budget=0.04)
    assert kept.shape == prefix.shape
    assert kept.dtype == torch.bool
    assert not kept.any()


# ---------------------------------------------------------------------- stale negatives


@given(seed=st.integers(0, 10**6), bounds=st.sampled_from([(0.5, 2.0), (0.0, 1.5), (0.8, math.inf), (1.0, 1.0)]))
@settings(deadline=None)
def test_a_negative_is_stopped_behind_its_first_outlier_against_a_loop(seed: int, bounds: tuple[float, float]) -> None:
    log_ratio, advantages, prefix = random_ratios(seed)
    stopped = behind_an_outlier(torch.where(prefix, log_ratio, torch.nan), advantages, prefix, bounds)
    for row in range(len(prefix)):
        seen = False
        for t in range(prefix.size(1)):
            assert bool(stopped[row, t]) == (seen and advantages[row, t].item() < 0)
            ratio = math.exp(log_ratio[row, t].item())
            seen |= bool(prefix[row, t]) and not bounds[0] <= ratio <= bounds[1]


@given(seed=st.integers(0, 10**6))
@settings(deadline=None)
def test_without_bounds_or_without_an_age_no_negative_is_stopped(seed: int) -> None:
    log_ratio, advantages, prefix = random_ratios(seed)
    assert not behind_an_outlier(log_ratio, advantages, prefix, (0.0, math.inf)).any()
    assert not behind_an_outlier(torch.zeros_like(log_ratio), advantages, prefix, (1.0, 1.0)).any()
