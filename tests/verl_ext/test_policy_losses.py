"""CTPO and M2PO against a re-computation token by token, finite differences, and verl's registry."""

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from verl.trainer.ppo.core_algos import agg_loss, get_policy_loss_fn

from verl_ext.policy_losses import LOSSES, M2PO_BUDGET, second_moment_bound

STEP = 1e-6
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def random_rows(seed: int, spread: float = 0.6, batch: int = 4, width: int = 6) -> Inputs:
    """log_prob (with gradient), old_log_prob, advantages, mask with holes; one row that is no sample."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    log_prob = -noise(batch, width).abs()
    mask = torch.rand(batch, width, generator=generator) > 0.2
    mask[0] = False
    old = log_prob + spread * noise(batch, width)
    return log_prob.requires_grad_(), old, noise(batch, 1).expand(batch, width), mask


def ctpo_by_hand(inputs: Inputs, row: int, place: int, shift: float) -> float:
    """Loss of a token whose log-prob moves by `shift`, its predecessors held."""
    log_prob, old, advantages, mask = (tensor.detach() for tensor in inputs)
    before = [t for t in range(place + 1) if mask[row, t]]
    c = math.exp(sum(float(log_prob[row, t] - old[row, t]) for t in before) + shift)
    a, root = float(advantages[row, place]), math.sqrt(len(before))
    if a >= 0:
        return -a * min(c, math.exp(0.05 * root))
    return -a * min(max(c, math.exp(-0.025 * root)), math.exp(0.05 * root))


def bound_by_bisection(squares: list[float], budget: float) -> float:
    if not squares or sum(squares) / len(squares) <= budget:
        return math.inf
    low, high = 0.0, max(squares) ** 0.5
    for _ in range(200):
        tau = (low + high) / 2
        fits = sum(min(square, tau**2) for square in squares) / len(squares) <= budget
        low, high = (tau, high) if fits else (low, tau)
    return low


def m2po_by_hand(inputs: Inputs, row: int, place: int, shift: float) -> float:
    log_prob, old, advantages, mask = (tensor.detach() for tensor in inputs)
    squares = []
    for i in range(len(mask)):
        for t in range(mask.size(1)):
            d, a = float(log_prob[i, t] - old[i, t]), float(advantages[i, t])
            if mask[i, t] and ((a > 0 and d > 0) or (a < 0 and d < 0)):
                squares.append(d * d)
    tau = bound_by_bisection(squares, 0.04)
    ratio, a = math.exp(float(log_prob[row, place] - old[row, place]) + shift), float(advantages[row, place])
    return -a * (min(ratio, math.exp(tau)) if a >= 0 else max(ratio, math.exp(-tau)))


BY_HAND = {"ctpo": ctpo_by_hand, "m2po": m2po_by_hand}


def test_every_loss_has_a_formula_here() -> None:
    assert BY_HAND.keys() == LOSSES.keys()


@pytest.mark.parametrize("name", LOSSES)
@given(seed=st.integers(0, 10**6), spread=st.sampled_from([0.01, 0.1, 0.6, 2.0]))
@settings(deadline=None)
def test_losses_gradients_and_reported_clips_are_those_of_the_formula(name: str, seed: int, spread: float) -> None:
    inputs = random_rows(seed, spread)
    losses, (held, dual) = LOSSES[name](*inputs)
    (gradient,) = torch.autograd.grad(losses.sum(), inputs[0])
    for row, place in inputs[3].nonzero().tolist():
        here, above, below = (BY_HAND[name](inputs, row, place, shift) for shift in (0.0, STEP, -STEP))
        assert losses[row, place].item() == pytest.approx(here, rel=1e-9, abs=1e-12)
        if math.isclose(above - here, here - below, rel_tol=1e-3, abs_tol=1e-12):  # no clip starts here
            slope = (above - below) / (2 * STEP)
            assert gradient[row, place].item() == pytest.approx(slope, rel=1e-5, abs=1e-7)
            assert bool(held[row, place] | dual[row, place]) == (gradient[row, place].item() == 0)


@given(squares=st.lists(st.floats(0, 4), max_size=9), budget=st.sampled_from([0.01, 0.04, 1.0]))
@settings(deadline=None)
def test_the_bound_spends_the_budget_and_no_more(squares: list[float], budget: float) -> None:
    tau = second_moment_bound(torch.tensor(squares, dtype=torch.float64), budget)
    assert tau == pytest.approx(bound_by_bisection(squares, budget), rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_where_policies_agree_the_gradient_is_minus_the_advantage(name: str) -> None:
    log_prob, _, advantages, mask = random_rows(0)
    losses, (held, dual) = LOSSES[name](log_prob, log_prob.detach(), advantages, mask)
    (gradient,) = torch.autograd.grad(losses.sum(), log_prob)
    torch.testing.assert_close(gradient, -advantages.clone())
    assert not (held | dual).any()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("log_ratio", [-1000.0, 1000.0])
def test_all_stays_finite_however_far_policies_are_apart(name: str, log_ratio: float) -> None:
    log_prob, _, advantages, mask = random_rows(0)
    losses, _ = LOSSES[name](log_prob, log_prob.detach() - log_ratio, advantages, mask)
    (gradient,) = torch.autograd.grad(losses.sum(), log_prob)
    assert losses.isfinite().all()
    assert gradient.isfinite().all()


def test_m2po_depends_on_what_is_in_the_micro_batch_as_published() -> None:
    """One wild row beside a tame one: alone, the tame one is within the budget and keeps its whole gradient."""
    old = torch.zeros(2, 4, dtype=torch.float64)
    log_prob = torch.tensor([[0.15] * 4, [3.0] * 4], dtype=torch.float64).requires_grad_()
    ones, mask = torch.ones(2, 4, dtype=torch.float64), torch.ones(2, 4)
    together, _ = LOSSES["m2po"](log_prob, old, ones, mask)
    alone, _ = LOSSES["m2po"](log_prob[:1], old[:1], ones[:1], mask[:1])
    assert M2PO_BUDGET > 0.15**2
    assert torch.equal(together[:1], alone)  # below the common bound
    halved, _ = LOSSES["m2po"](log_prob, old - 0.1, ones, mask)
    assert (halved[0] > -math.exp(0.25)).all()  # 0.25^2 > 0.04: held by the bound that the two rows share


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("weighed", [False, True])
def test_verl_finds_them_by_name_and_weights_and_masks_count(name: str, weighed: bool) -> None:
    log_prob, old, advantages, mask = random_rows(3)
    weights = torch.linspace(0, 2, mask.numel(), dtype=torch.float64).view_as(old) if weighed else None
    info = {"dp_size": 2, "batch_num_tokens": 57, "global_batch_size": 12}
    loss_fn: Any = get_policy_loss_fn(name)
    config = OmegaConf.create({"global_batch_info": info})
    loss, metrics = loss_fn(old, log_prob, advantages, mask, "token-mean", config, weights)
    losses, (held, _) = LOSSES[name](log_prob, old, advantages, mask)
    expected = agg_loss(
        loss_mat=losses * (1 if weights is None else weights), loss_mask=mask, loss_agg_mode="token-mean", **info
    )
    assert torch.equal(loss, expected)
    assert metrics["actor/pg_clipfrac"] == pytest.approx(float(held[mask].double().mean()))
    assert set(metrics) == {"actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"}


def test_they_can_be_imported_before_anything_of_verl() -> None:
    """Importing verl's algorithms brings the recipe's registrations along, which want this module in turn."""
    done = subprocess.run([sys.executable, "-c", "import verl_ext.policy_losses"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
