"""The weight behind a prefix, against loops, and what importance sampling promises of it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe.soup.algorithm.continuation_weights import LOG_WEIGHTS, continuation_weights, others_on_the_prefix

WINDOWS = [(0.025, 0.05), (0.0, 0.0), (math.inf, 0.5), (math.inf, math.inf)]


def random_rows(seed: int, batch: int = 6, width: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-ratios that are wild off the prefix, and prefixes of 0 to all tokens."""
    generator = torch.Generator().manual_seed(seed)
    prefix = torch.arange(width) < torch.randint(0, width + 1, (batch, 1), generator=generator)
    log_ratio = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    return torch.where(prefix, log_ratio, torch.nan), prefix


def by_hand(ratios: list[float], kind: str, window: tuple[float, float]) -> float:
    if not ratios:
        return 1.0
    if kind == "min":
        return min(ratios)
    product, root = math.prod(ratios), math.sqrt(len(ratios))
    return min(max(product, math.exp(-window[0] * root)), math.exp(window[1] * root)) if kind == "window" else product


@pytest.mark.parametrize("kind", LOG_WEIGHTS)
@given(seed=st.integers(0, 10**6), window=st.sampled_from(WINDOWS))
@settings(deadline=None)
def test_weights_are_those_of_the_formula_and_what_is_off_the_prefix_does_not_matter(
    kind: str, seed: int, window: tuple[float, float]
) -> None:
    log_ratio, prefix = random_rows(seed)
    weights, held = continuation_weights(log_ratio, prefix, kind, window)
    for row in range(len(prefix)):
        ratios = [math.exp(value) for value in log_ratio[row][prefix[row]].tolist()]
        assert weights[row].item() == pytest.approx(by_hand(ratios, kind, window), rel=1e-12)
        outside = kind == "window" and not math.isclose(math.prod(ratios), weights[row].item(), rel_tol=1e-9)
        assert bool(held[row]) == outside


@pytest.mark.parametrize("kind", LOG_WEIGHTS)
@given(seed=st.integers(0, 10**6))
@settings(deadline=None)
def test_where_both_policies_agree_on_the_prefix_the_weight_is_exactly_one(kind: str, seed: int) -> None:
    log_ratio, prefix = random_rows(seed)
    weights, held = continuation_weights(log_ratio.masked_fill(prefix, 0.0), prefix, kind, (0.025, 0.05))
    assert (weights == 1).all()
    assert not held.any()


@given(seed=st.integers(0, 10**6))
@settings(deadline=None)
def test_with_the_others_each_prefix_token_weighs_the_whole_product(seed: int) -> None:
    log_ratio, prefix = random_rows(seed)
    others = others_on_the_prefix(log_ratio, prefix)
    behind, _ = continuation_weights(log_ratio, prefix, "whole", (0.0, 0.0))
    for row, place in prefix.nonzero().tolist():
        own = log_ratio[row, place].exp()
        assert float(others[row, place] * own) == pytest.approx(float(behind[row]), rel=1e-12)
    assert (others[~prefix] == 1).all()
    assert (others_on_the_prefix(log_ratio.masked_fill(prefix, 0.0), prefix) == 1).all()
    assert others_on_the_prefix(log_ratio * 1000, prefix).isfinite().all()


@pytest.mark.parametrize("kind", LOG_WEIGHTS)
@pytest.mark.parametrize("log_ratio", [-1000.0, 1000.0])
def test_a_weight_is_finite_however_far_policies_are_apart_and_tells_that_it_was_cut(
    kind: str, log_ratio: float
) -> None:
    rows = torch.full((2, 3), log_ratio)
    weights, held = continuation_weights(rows, torch.ones(2, 3, dtype=torch.bool), kind, (math.inf, math.inf))
    assert weights.isfinite().all()
    assert held.all()
    assert weights.dtype == rows.dtype


@given(seed=st.integers(0, 10**6), length=st.integers(1, 4))
@settings(deadline=None)
def test_the_products_mean_over_what_the_historical_policy_writes_is_one(seed: int, length: int) -> None:
    """Every prefix of three tokens is enumerated; no other choice has this property, unless policies agree."""
    generator = torch.Generator().manual_seed(seed)
    mu, pi = torch.randn(2, length, 3, generator=generator, dtype=torch.float64).log_softmax(-1)
    tokens = torch.cartesian_prod(*[torch.arange(3)] * length).reshape(-1, length)
    place = torch.arange(length)
    log_mu, log_pi = mu[place, tokens], pi[place, tokens]
    chance, prefix = log_mu.sum(1).exp(), torch.ones_like(log_mu, dtype=torch.bool)
    mean = {k: float(chance @ continuation_weights(log_pi - log_mu, prefix, k, (0.025, 0.05))[0]) for k in LOG_WEIGHTS}
    assert mean["product"] == pytest.approx(1, rel=1e-12)
    assert mean["min"] <= 1 + 1e-12  # never above the ratio of the first token, whose mean is 1
