"""The tables of docs/after_the_prefix.md are those of the enumeration, and the enumeration is right."""

import math

import pytest
import torch

from benchmarks.after_the_prefix import (
    LONGEST,
    MASK,
    PAGE,
    REWARDS,
    WAYS,
    WINDOW,
    figures,
    gradient,
    log_probs,
    scores,
    token_weights,
    trained,
    with_tables,
)


@pytest.fixture(scope="module")
def run() -> list[torch.Tensor]:
    return trained(0)


def test_the_page_has_the_tables_that_the_enumeration_gives() -> None:
    page = PAGE.read_text()
    assert with_tables(page) == page, "run python -m benchmarks.after_the_prefix"


def test_the_responses_are_all_that_there_are(run: list[torch.Tensor]) -> None:
    for theta in (run[0], run[-1]):
        assert float(log_probs(theta).sum(1).exp().sum()) == pytest.approx(1, rel=1e-12)
    assert 0 < REWARDS.sum() < len(REWARDS)


def test_the_exact_gradient_is_that_of_the_expected_reward(run: list[torch.Tensor]) -> None:
    theta = run[-1].clone().requires_grad_()
    chance = log_probs(theta).sum(1).exp()
    (expected,) = torch.autograd.grad(chance @ REWARDS, theta)
    chance = chance.detach()
    advantages = REWARDS - chance @ REWARDS
    found = gradient(scores(run[-1]), (chance * advantages)[:, None].expand_as(MASK))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def weights_by_hand(theta: torch.Tensor, mu: torch.Tensor, length: int, how: str) -> torch.Tensor:
    """Response by response, in plain Python."""
    ratios = (log_probs(theta) - log_probs(mu)).exp()
    weights = torch.ones_like(ratios)
    for row, own in enumerate(ratios):
        there = min(length, int(MASK[row].sum()))
        of_prefix = own[:there].tolist()
        product = math.prod(of_prefix)
        bounds = math.exp(-WINDOW[0] * there**0.5), math.exp(WINDOW[1] * there**0.5)
        behind = {"none": 1.0, "min": min(of_prefix), "window": min(max(product, bounds[0]), bounds[1])}
        for place in range(LONGEST):
            on_prefix = {"running": math.prod(of_prefix[: place + 1]), "whole": product}
            inside = on_prefix.get(how, own[place].item())
            weights[row, place] = inside if place < there else behind.get(how, product)
    return weights


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("length", [1, 2, 3])
def test_weights_and_bias_against_loops_and_automatic_differentiation(
    how: str, length: int, run: list[torch.Tensor]
) -> None:
    theta, mu = run[-1], run[-17]
    weights = weights_by_hand(theta, mu, length, how)
    torch.testing.assert_close(token_weights(theta, mu, length, how)[MASK], weights[MASK], rtol=1e-10, atol=0)
    leaf = theta.clone().requires_grad_()
    log_pi, prefix = log_probs(leaf), torch.arange(LONGEST) < length
    on_policy = log_pi.sum(1).exp()
    (exact,) = torch.autograd.grad(on_policy @ REWARDS, leaf, retain_graph=True)
    advantages = REWARDS - on_policy.detach() @ REWARDS
    chance = torch.where(prefix, log_probs(mu), log_pi.detach()).sum(1).exp()
    (mean,) = torch.autograd.grad((chance * advantages) @ (weights * log_pi).sum(1), leaf)
    found = figures(theta, mu, how, (length,))
    assert found.bias == pytest.approx(float((mean - exact).norm() / exact.norm()), rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("how", WAYS)
def test_without_an_age_nothing_is_biased_and_all_have_the_variance_of_samples_of_the_policy(
    how: str, run: list[torch.Tensor]
) -> None:
    found, plain = (figures(run[-1], run[-1], name) for name in (how, "none"))
    assert max(found.bias, found.prefix_bias, found.continuation_bias) < 1e-12
    assert found.variance == pytest.approx(plain.variance, rel=1e-12)


@pytest.mark.parametrize("lag", [1, 16, 64])
def test_the_product_cures_what_is_behind_and_the_whole_product_everything(lag: int, run: list[torch.Tensor]) -> None:
    none, product, whole = (figures(run[-1], run[-1 - lag], how) for how in ("none", "product", "whole"))
    assert product.continuation_bias < 1e-12 < none.continuation_bias
    assert product.prefix_bias == pytest.approx(none.prefix_bias)
    assert whole.bias < 1e-12


def test_bias_and_variance_are_those_of_samples(run: list[torch.Tensor]) -> None:
    """Drawn ones, whose gradients are added up one by one."""
    theta, mu, prefix = run[-1], run[-65], torch.arange(LONGEST) < 2
    log_pi = log_probs(theta)
    chance = torch.where(prefix, log_probs(mu), log_pi).sum(1).exp()
    drawn = torch.multinomial(chance, 200_000, True, generator=torch.Generator().manual_seed(0))
    advantages = REWARDS - log_pi.sum(1).exp() @ REWARDS
    weights = token_weights(theta, mu, 2, "product") * advantages[:, None]
    each = torch.stack([gradient(row_of(scores(theta), row), weights) for row in range(len(MASK))])
    samples, exact = each[drawn].flatten(1), gradient(scores(theta), weights_on_policy(theta, advantages)).flatten()
    found = figures(theta, mu, "product", (2,))
    assert float(samples.var(0).sum() / exact.norm() ** 2) == pytest.approx(found.variance, rel=0.05)
    assert float((samples.mean(0) - exact).norm() / exact.norm()) == pytest.approx(found.bias, rel=0.1)


def row_of(score: torch.Tensor, row: int) -> torch.Tensor:
    return torch.where((torch.arange(len(score)) == row)[:, None, None], score, 0.0)


def weights_on_policy(theta: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    return (log_probs(theta).sum(1).exp() * advantages)[:, None].expand_as(MASK)
