"""Every ratio's loss against a re-computation token by token, finite differences, and verl's own loss."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from verl.trainer.ppo.core_algos import agg_loss, compute_policy_loss_vanilla

from recipe.soup.algorithm.losses.inputs import Clip, LossInputs, LossOutputs
from recipe.soup.algorithm.losses.registry import RATIOS

CLIPS = {
    "one for both segments": Clip(0.2, 0.28, 0.2, 0.28, 3.0),
    "own": Clip(0.2, 0.28, 0.6, 1.5, 3.0),
    "tighter dual": Clip(0.3, 0.3, 0.1, 0.1, 1.2),
    "none on the prefix": Clip(0.2, 0.28, math.inf, math.inf, 3.0),
    "none on the prefix, no dual": Clip(0.2, 0.28, math.inf, math.inf, math.inf),
    "only from below": Clip(0.2, 0.28, 0.4, math.inf, math.inf),
}
NO_CLIP = Clip(math.inf, math.inf, math.inf, math.inf, math.inf)
GAMMAS = (0.1, 0.7)
STEP = 1e-5


@dataclass(frozen=True)
class Token:
    log_prob: float
    old: float
    advantage: float
    prefix: bool

    @property
    def log_ratio(self) -> float:
        return self.log_prob - self.old


# ---------------------------------------------------------------------- the mathematics

Formula = Callable[[float, Token, Clip, float], float]
"""Loss as a function of the log-prob; what the formula takes as constant is read off the token."""


def clipped(log_prob: float, token: Token, clip: Clip, _: float) -> float:
    """A gain is counted up to 1 + high; a loss is counted from 1 - low on, up to dual."""
    ratio, a = math.exp(log_prob - token.old), token.advantage
    low, high = (clip.prefix_low, clip.prefix_high) if token.prefix else (clip.low, clip.high)
    return -a * min(ratio, 1 + high) if a >= 0 else -a * min(max(ratio, 1 - low), clip.dual)


def detached(log_prob: float, token: Token, clip: Clip, gamma: float) -> float:
    if token.prefix:
        return -token.advantage * math.exp(log_prob - token.log_prob)
    return clipped(log_prob, token, clip, gamma)


def shaped(log_prob: float, token: Token, clip: Clip, gamma: float) -> float:
    if token.prefix:
        return -token.advantage / (1 + gamma * math.exp(token.old - log_prob))
    return clipped(log_prob, token, clip, gamma)


def luffy(log_prob: float, token: Token, clip: Clip, gamma: float) -> float:
    if token.prefix:
        return -token.advantage / (1 + gamma / math.exp(log_prob))
    return clipped(log_prob, token, clip, gamma)


def nll(log_prob: float, token: Token, clip: Clip, coefficient: float) -> float:
    return -coefficient * log_prob if token.prefix else clipped(log_prob, token, clip, coefficient)


FORMULAS: dict[str, Formula] = {
    "behavior": clipped,
    "decoupled": clipped,
    "detached": detached,
    "shaped": shaped,
    "luffy": luffy,
    "nll": nll,
}
BY_REWARD = [name for name in RATIOS if name != "nll"]


def expected_clips(name: str, token: Token, clip: Clip) -> tuple[bool, bool, bool]:
    """Which of low, high and dual leaves no gradient."""
    if token.prefix and not RATIOS[name].clips_prefix:
        return False, False, False
    ratio = math.exp(token.log_ratio)
    low, high = (clip.prefix_low, clip.prefix_high) if token.prefix else (clip.low, clip.high)
    losing, gaining = token.advantage < 0, token.advantage > 0
    return losing and ratio < 1 - low, gaining and ratio > 1 + high, losing and ratio > clip.dual


# ---------------------------------------------------------------------- data


def log_probs() -> st.SearchStrategy[float]:
    return st.floats(-5, 0).map(lambda value: round(value, 6))


def token_lists() -> st.SearchStrategy[list[Token]]:
    advantages = st.floats(-3, 3).map(lambda value: round(value, 4))
    return st.lists(st.builds(Token, log_probs(), log_probs(), advantages, st.booleans()), min_size=1, max_size=12)


GRID = [
    Token(-2 + log_ratio / 2, -2 - log_ratio / 2, advantage, prefix)
    for log_ratio in (-3.0, -1.1, -0.4, -0.15, -0.05, 0.05, 0.15, 0.3, 0.7, 1.05, 1.3, 3.0)
    for advantage in (-1.3, 0.0, 0.7)
    for prefix in (False, True)
]
"""On both sides of every clip of `CLIPS`."""


def is_smooth(token: Token, clip: Clip) -> bool:
    """Whether no clip starts within reach of a finite difference."""
    starts = (1 - clip.low, 1 + clip.high, 1 - clip.prefix_low, 1 + clip.prefix_high, clip.dual)
    return all(abs(math.exp(token.log_ratio) - start) > 100 * STEP for start in starts)


def row(tokens: list[Token], clip: Clip, gamma: float = 0.1) -> LossInputs:
    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor([values], dtype=torch.float64)

    return LossInputs(
        log_probs=column([token.log_prob for token in tokens]).requires_grad_(),
        old_log_probs=column([token.old for token in tokens]),
        advantages=column([token.advantage for token in tokens]),
        prefix=torch.tensor([[token.prefix for token in tokens]]),
        clip=clip,
        gamma=gamma,
        nll_coefficient=gamma,
    )


def random_rows(seed: int, dtype: torch.dtype = torch.float32, batch: int = 6, width: int = 9) -> LossInputs:
    generator = torch.Generator().manual_seed(seed)

    def noise() -> torch.Tensor:
        return -3 * torch.rand(batch, width, generator=generator, dtype=dtype)

    lengths = torch.randint(0, width + 1, (batch, 1), generator=generator)
    return LossInputs(
        log_probs=noise().requires_grad_(),
        old_log_probs=noise(),
        advantages=torch.randn(batch, 1, generator=generator, dtype=dtype).expand(-1, width),
        prefix=torch.arange(width) < lengths,
        clip=CLIPS["own"],
    )


def with_gradient(name: str, inputs: LossInputs) -> tuple[LossOutputs, torch.Tensor]:
    outputs = RATIOS[name].loss(inputs)
    (gradient,) = torch.autograd.grad(outputs.losses.sum(), inputs.log_probs)
    return outputs, gradient


# ---------------------------------------------------------------------- against the mathematics


def test_every_ratio_has_a_formula_here() -> None:
    assert FORMULAS.keys() == RATIOS.keys()


@pytest.mark.parametrize("name", RATIOS)
@settings(deadline=None)
@example(tokens=GRID, clip=CLIPS["one for both segments"], gamma=0.1)
@example(tokens=GRID, clip=CLIPS["own"], gamma=0.7)
@example(tokens=GRID, clip=CLIPS["tighter dual"], gamma=0.1)
@example(tokens=GRID, clip=CLIPS["none on the prefix"], gamma=0.1)
@example(tokens=GRID, clip=CLIPS["none on the prefix, no dual"], gamma=0.1)
@example(tokens=GRID, clip=CLIPS["only from below"], gamma=0.1)
@given(tokens=token_lists(), clip=st.sampled_from(list(CLIPS.values())), gamma=st.sampled_from(GAMMAS))
def test_loss_and_gradient_are_those_of_the_formula(name: str, tokens: list[Token], clip: Clip, gamma: float) -> None:
    outputs, gradient = with_gradient(name, row(tokens, clip, gamma))
    formula = FORMULAS[name]
    for index, token in enumerate(tokens):
        value = formula(token.log_prob, token, clip, gamma)
        assert outputs.losses[0, index].item() == pytest.approx(value, rel=1e-12, abs=1e-15)
        if is_smooth(token, clip):
            above, below = (formula(token.log_prob + step, token, clip, gamma) for step in (STEP, -STEP))
            slope = (above - below) / (2 * STEP)
            assert gradient[0, index].item() == pytest.approx(slope, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", RATIOS)
@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS.keys())
def test_clips_are_reported_where_they_bind(name: str, clip: Clip) -> None:
    outputs = RATIOS[name].loss(row(GRID, clip))
    reported = zip(
        outputs.clipped_low[0].tolist(),
        outputs.clipped_high[0].tolist(),
        outputs.clipped_dual[0].tolist(),
        strict=True,
    )
    assert list(reported) == [expected_clips(name, token, clip) for token in GRID]


@pytest.mark.parametrize("name", RATIOS)
@settings(deadline=None)
@example(tokens=GRID, clip=CLIPS["one for both segments"])
@example(tokens=GRID, clip=CLIPS["none on the prefix"])
@given(tokens=token_lists(), clip=st.sampled_from(list(CLIPS.values())))
def test_a_reported_clip_leaves_no_gradient_and_elsewhere_its_size_is_the_mass(
    name: str, tokens: list[Token], clip: Clip
) -> None:
    tokens = [token for token in tokens if is_smooth(token, clip)]
    assume(tokens)  # a row without any has no dtypes either
    outputs, gradient = with_gradient(name, row(tokens, clip))
    held = outputs.clipped_low | outputs.clipped_high | outputs.clipped_dual
    assert (gradient[held] == 0).all()
    torch.testing.assert_close(gradient[~held].abs(), outputs.mass[~held], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", RATIOS)
@given(tokens=token_lists(), clip=st.sampled_from(list(CLIPS.values())))
@settings(deadline=None)
def test_mass_is_the_gradient_without_any_clip(name: str, tokens: list[Token], clip: Clip) -> None:
    free, gradient = with_gradient(name, row(tokens, NO_CLIP))
    mass = RATIOS[name].loss(row(tokens, clip)).mass
    torch.testing.assert_close(mass, gradient.abs(), rtol=1e-12, atol=1e-15)
    assert not (free.clipped_low | free.clipped_high | free.clipped_dual).any()
    assert not mass.requires_grad


@pytest.mark.parametrize("name", [name for name, ratio in RATIOS.items() if not ratio.clips_prefix])
@given(seed=st.integers(0, 10**6))
@settings(deadline=None)
def test_a_ratio_without_a_prefix_clip_ignores_its_range(name: str, seed: int) -> None:
    inputs = random_rows(seed)
    narrow, wide = (
        RATIOS[name].loss(replace(inputs, clip=replace(inputs.clip, prefix_low=width, prefix_high=width)))
        for width in (0.01, math.inf)
    )
    assert torch.equal(narrow.losses, wide.losses)


# ---------------------------------------------------------------------- against verl

AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")


@pytest.mark.parametrize("name", RATIOS)
@pytest.mark.parametrize("loss_agg_mode", AGGREGATIONS)
@pytest.mark.parametrize("batch_info", [{}, {"dp_size": 2, "batch_num_tokens": 57, "global_batch_size": 12}])
def test_without_a_prefix_it_is_verls_loss_bit_for_bit(
    name: str, loss_agg_mode: str, batch_info: dict[str, int]
) -> None:
    config = OmegaConf.create(
        {
            "clip_ratio": 0.2,
            "clip_ratio_low": 0.2,
            "clip_ratio_high": 0.28,
            "clip_ratio_c": 3.0,
            "global_batch_info": batch_info,
        }
    )
    vanilla: Any = compute_policy_loss_vanilla
    for seed in range(10):
        inputs = random_rows(seed)
        inputs = replace(inputs, prefix=torch.zeros_like(inputs.prefix))
        mask = torch.rand(inputs.prefix.shape, generator=torch.Generator().manual_seed(seed)) > 0.3
        mask[0] = False  # a row that is no sample
        ours = agg_loss(
            loss_mat=RATIOS[name].loss(inputs).losses, loss_mask=mask, loss_agg_mode=loss_agg_mode, **batch_info
        )
        verls, _ = vanilla(
            old_log_prob=inputs.old_log_probs,
            log_prob=inputs.log_probs,
            advantages=inputs.advantages,
            response_mask=mask,
            loss_agg_mode=loss_agg_mode,
            config=config,
        )
        assert torch.equal(ours, verls)
        (our_gradient,) = torch.autograd.grad(ours, inputs.log_probs)
        (their_gradient,) = torch.autograd.grad(verls, inputs.log_probs)
        assert our_gradient.abs().sum() > 0
        assert torch.equal(our_gradient, their_gradient)


# ---------------------------------------------------------------------- properties


@pytest.mark.parametrize("name", RATIOS)
@given(seed=st.integers(0, 10**6))
@settings(deadline=None)
def test_where_policies_agree_the_gradient_is_minus_the_advantage(name: str, seed: int) -> None:
    inputs = random_rows(seed)
    _, gradient = with_gradient(name, replace(inputs, old_log_probs=inputs.log_probs.detach()))
    shaped_tokens = inputs.prefix if name in ("shaped", "luffy", "nll") else torch.zeros_like(inputs.prefix)
    assert torch.equal(gradient[~shaped_tokens], -inputs.advantages[~shaped_tokens])
    if name == "shaped":
        torch.testing.assert_close(gradient[shaped_tokens], -inputs.advantages[shaped_tokens] * 0.1 / 1.1**2)


@pytest.mark.parametrize("name", RATIOS)
@given(seed=st.integers(0, 10**6), order=st.permutations(range(6)))
@settings(deadline=None)
def test_permuting_the_rows_permutes_the_losses(name: str, seed: int, order: list[int]) -> None:
    inputs = random_rows(seed)
    permuted = LossInputs(
        log_probs=inputs.log_probs[order],
        old_log_probs=inputs.old_log_probs[order],
        advantages=inputs.advantages[order],
        prefix=inputs.prefix[order],
        clip=inputs.clip,
    )
    before, after = RATIOS[name].loss(inputs), RATIOS[name].loss(permuted)
    assert torch.equal(before.losses[order], after.losses)
    assert torch.equal(before.mass[order], after.mass)


@pytest.mark.parametrize("name", BY_REWARD)
@pytest.mark.parametrize("clip", [*CLIPS.values(), NO_CLIP], ids=[*CLIPS.keys(), "none"])
def test_a_constant_reward_has_exactly_no_gradient(name: str, clip: Clip) -> None:
    for seed in range(20):
        inputs = random_rows(seed)
        zeros = torch.zeros_like(inputs.advantages)
        outputs, gradient = with_gradient(name, replace(inputs, advantages=zeros, clip=clip))
        assert (gradient == 0).all()
        assert (outputs.losses == 0).all()
        assert (outputs.mass == 0).all()
        assert not (outputs.clipped_low | outputs.clipped_high | outputs.clipped_dual).any()


@pytest.mark.parametrize("name", RATIOS)
@pytest.mark.parametrize("clip", [*CLIPS.values(), NO_CLIP], ids=[*CLIPS.keys(), "none"])
@pytest.mark.parametrize("log_ratio", [-1000.0, -100.0, 100.0, 1000.0])
def test_loss_and_gradient_stay_finite_however_far_policies_are_apart(name: str, clip: Clip, log_ratio: float) -> None:
    inputs = replace(random_rows(0), clip=clip)
    old_log_probs = inputs.log_probs.detach() - log_ratio
    outputs, gradient = with_gradient(name, replace(inputs, old_log_probs=old_log_probs))
    assert outputs.losses.isfinite().all()
    assert outputs.mass.isfinite().all()
    assert gradient.isfinite().all()


@given(seed=st.integers(0, 10**6), shift=st.floats(-30, 30))
@settings(deadline=None)
def test_detached_gives_the_prefix_a_ratio_of_one_whatever_sampled_it(seed: int, shift: float) -> None:
    inputs = random_rows(seed)
    prefix, advantages = inputs.prefix, inputs.advantages
    outputs, gradient = with_gradient("detached", replace(inputs, old_log_probs=inputs.old_log_probs + shift))
    assert torch.equal(outputs.losses[prefix], -advantages[prefix])
    assert torch.equal(gradient[prefix], -advantages[prefix])


@given(seed=st.integers(0, 10**6), shift=st.floats(-30, 30))
@settings(deadline=None)
def test_luffy_takes_no_notice_of_who_sampled_the_prefix(seed: int, shift: float) -> None:
    inputs = random_rows(seed)
    shifted = torch.where(inputs.prefix, inputs.old_log_probs + shift, inputs.old_log_probs)
    before, after = (
        with_gradient("luffy", replace(inputs, old_log_probs=old)) for old in (inputs.old_log_probs, shifted)
    )
    assert torch.equal(before[0].losses, after[0].losses)
    assert torch.equal(before[1], after[1])


@given(seed=st.integers(0, 10**6), shift=st.floats(-30, 30), scale=st.floats(-3, 3))
@settings(deadline=None)
def test_nll_imitates_whoever_wrote_the_prefix_and_whatever_it_earned(seed: int, shift: float, scale: float) -> None:
    inputs = replace(random_rows(seed), nll_coefficient=0.25)
    other = replace(inputs, old_log_probs=inputs.old_log_probs + shift, advantages=inputs.advantages * scale)
    outputs, gradient = with_gradient("nll", other)
    assert torch.equal(outputs.losses[inputs.prefix], -0.25 * inputs.log_probs[inputs.prefix])
    assert (gradient[inputs.prefix] == -0.25).all()


@pytest.mark.parametrize("name", RATIOS)
def test_the_loss_of_a_token_depends_on_that_token_alone(name: str) -> None:
    inputs = random_rows(3)
    whole = RATIOS[name].loss(inputs).losses
    for b in range(inputs.prefix.size(0)):
        part = LossInputs(
            log_probs=inputs.log_probs[b : b + 1, 2:4],
            old_log_probs=inputs.old_log_probs[b : b + 1, 2:4],
            advantages=inputs.advantages[b : b + 1, 2:4],
            prefix=inputs.prefix[b : b + 1, 2:4],
            clip=inputs.clip,
        )
        assert torch.equal(RATIOS[name].loss(part).losses, whole[b : b + 1, 2:4])
