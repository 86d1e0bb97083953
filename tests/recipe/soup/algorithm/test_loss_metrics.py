"""Loss metrics against plain loops, and that they do not depend on how a batch is split."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe.soup.algorithm.loss_metrics import PREFIX, loss_sums, means_of_loss_sums
from recipe.soup.algorithm.losses.inputs import Clip, LossInputs, LossOutputs
from recipe.soup.algorithm.losses.registry import RATIOS

CLIP = Clip(low=0.2, high=0.28, prefix_low=0.4, prefix_high=0.6, dual=3.0)


def random_inputs(seed: int, batch: int = 6, width: int = 5) -> tuple[LossInputs, torch.Tensor]:
    """A micro-batch and its response mask; the last row is no sample."""
    generator = torch.Generator().manual_seed(seed)
    log_probs, old_log_probs = (-2 * torch.rand(batch, width, generator=generator) for _ in range(2))
    advantages = torch.randn(batch, 1, generator=generator).expand(-1, width)
    lengths = torch.randint(1, width + 1, (batch, 1), generator=generator)
    mask = torch.arange(width) < lengths
    mask[-1] = False
    prefix = torch.arange(width) < torch.randint(0, width + 1, (batch, 1), generator=generator)
    return LossInputs(log_probs, old_log_probs, advantages, prefix & mask, CLIP), mask


def part(inputs: LossInputs, rows: slice) -> LossInputs:
    return replace(
        inputs,
        log_probs=inputs.log_probs[rows],
        old_log_probs=inputs.old_log_probs[rows],
        advantages=inputs.advantages[rows],
        prefix=inputs.prefix[rows],
    )


def sums_of(name: str, inputs: LossInputs, mask: torch.Tensor) -> dict[str, float]:
    return loss_sums(inputs, RATIOS[name].loss(inputs), mask)


def by_loops(inputs: LossInputs, outputs: LossOutputs, mask: torch.Tensor) -> dict[str, float]:
    """The means, not the sums."""
    expected: dict[str, float] = {}
    for name, wanted in (("prefix", True), ("continuation", False)):
        ratios: list[float] = []
        low = high = dual = 0
        mass = held = 0.0
        for b in range(mask.size(0)):
            for t in range(mask.size(1)):
                if not mask[b, t] or bool(inputs.prefix[b, t]) != wanted:
                    continue
                ratios.append(math.exp(inputs.log_probs[b, t].item() - inputs.old_log_probs[b, t].item()))
                is_low, is_high = bool(outputs.clipped_low[b, t]), bool(outputs.clipped_high[b, t])
                is_dual = bool(outputs.clipped_dual[b, t])
                low, high, dual = low + is_low, high + is_high, dual + is_dual
                mass += outputs.mass[b, t].item()
                held += outputs.mass[b, t].item() if is_low or is_high or is_dual else 0.0
        n = len(ratios)
        squares = sum(ratio**2 for ratio in ratios)
        figures = {
            "tokens": n,
            "ratio": sum(ratios) / n if n else 0.0,
            "kl_k1": -sum(map(math.log, ratios)) / n if n else 0.0,
            "kl_k3": sum(ratio - 1 - math.log(ratio) for ratio in ratios) / n if n else 0.0,
            "clip_fraction/low": low / n if n else 0.0,
            "clip_fraction/high": high / n if n else 0.0,
            "clip_fraction/dual": dual / n if n else 0.0,
            "effective_sample_size": sum(ratios) ** 2 / (n * squares) if n else 0.0,
            "gradient_clipped": held / mass if mass else 0.0,
        }
        expected |= {f"soup/loss/{name}/{key}": value for key, value in figures.items()}
    return expected


@given(seed=st.integers(0, 10**6))
@settings(deadline=None)
def test_means_are_those_of_the_loops(seed: int) -> None:
    inputs, mask = random_inputs(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    # Made up, so that no loss has a say in it.
    low, high, dual = (torch.rand(mask.shape, generator=generator) < 0.3 for _ in range(3))
    outputs = LossOutputs(torch.zeros(mask.shape), torch.rand(mask.shape, generator=generator), low, high, dual)
    means = means_of_loss_sums(loss_sums(inputs, outputs, mask))
    assert means == pytest.approx(by_loops(inputs, outputs, mask), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", RATIOS)
@given(seed=st.integers(0, 10**6))
@settings(deadline=None)
def test_means_of_every_ratio_are_those_of_the_loops(name: str, seed: int) -> None:
    inputs, mask = random_inputs(seed)
    outputs = RATIOS[name].loss(inputs)
    means = means_of_loss_sums(loss_sums(inputs, outputs, mask))
    assert means == pytest.approx(by_loops(inputs, outputs, mask), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", RATIOS)
@given(seed=st.integers(0, 10**6), at=st.integers(0, 6))
@settings(deadline=None)
def test_how_a_batch_is_split_does_not_matter(name: str, seed: int, at: int) -> None:
    inputs, mask = random_inputs(seed)
    whole = sums_of(name, inputs, mask)
    parts = [sums_of(name, part(inputs, rows), mask[rows]) for rows in (slice(0, at), slice(at, None))]
    added = {key: sum(sums[key] for sums in parts) for key in parts[0]}
    assert added == pytest.approx(whole, rel=1e-12, abs=1e-12)
    assert means_of_loss_sums(added) == pytest.approx(means_of_loss_sums(whole), rel=1e-12, abs=1e-12)


def test_on_four_tokens_by_hand() -> None:
    ratio = torch.tensor([[0.5, 2.0, 1.0, 4.0]], dtype=torch.float64)
    inputs = LossInputs(
        log_probs=ratio.log(),
        old_log_probs=torch.zeros(1, 4, dtype=torch.float64),
        advantages=torch.tensor([[1.0, 1.0, -1.0, -1.0]], dtype=torch.float64),
        prefix=torch.tensor([[True, True, False, False]]),
        clip=CLIP,
    )
    means = means_of_loss_sums(sums_of("behavior", inputs, torch.ones(1, 4)))
    log2 = math.log(2)
    assert means == pytest.approx(
        {
            "soup/loss/prefix/tokens": 2,
            "soup/loss/prefix/ratio": 1.25,
            "soup/loss/prefix/kl_k1": 0.0,
            "soup/loss/prefix/kl_k3": 0.25,
            "soup/loss/prefix/clip_fraction/low": 0.0,
            "soup/loss/prefix/clip_fraction/high": 0.5,  # 2 is above 1.6
            "soup/loss/prefix/clip_fraction/dual": 0.0,
            "soup/loss/prefix/effective_sample_size": 2.5**2 / (2 * 4.25),
            "soup/loss/prefix/gradient_clipped": 2 / 2.5,
            "soup/loss/continuation/tokens": 2,
            "soup/loss/continuation/ratio": 2.5,
            "soup/loss/continuation/kl_k1": -log2,
            "soup/loss/continuation/kl_k3": 1.5 - log2,
            "soup/loss/continuation/clip_fraction/low": 0.0,
            "soup/loss/continuation/clip_fraction/high": 0.0,
            "soup/loss/continuation/clip_fraction/dual": 0.5,  # 4 is above 3
            "soup/loss/continuation/effective_sample_size": 25 / (2 * 17),
            "soup/loss/continuation/gradient_clipped": 4 / 5,
        },
        abs=1e-15,
    )


@pytest.mark.parametrize("name", RATIOS)
def test_keys_do_not_depend_on_the_data_and_nothing_is_nan(name: str) -> None:
    inputs, mask = random_inputs(0)
    no_prefix = replace(inputs, prefix=torch.zeros_like(inputs.prefix))
    all_prefix = replace(inputs, prefix=mask)
    no_advantage = replace(inputs, advantages=torch.zeros_like(inputs.advantages))
    sums = sums_of(name, inputs, mask)
    means = means_of_loss_sums(sums)
    cases = [(no_prefix, mask), (all_prefix, mask), (no_advantage, mask), (inputs, torch.zeros_like(mask))]
    for case, case_mask in cases:
        case_sums = sums_of(name, case, case_mask)
        assert case_sums.keys() == sums.keys()
        case_means = means_of_loss_sums(case_sums)
        assert case_means.keys() == means.keys()
        assert all(math.isfinite(value) for value in (*case_sums.values(), *case_means.values()))
    assert all(key.startswith(PREFIX) for key in means)


@pytest.mark.parametrize("segment", ["prefix", "continuation"])
def test_an_empty_segment_is_all_zeros_and_the_other_is_not(segment: str) -> None:
    inputs, mask = random_inputs(0)
    inputs = replace(inputs, prefix=torch.zeros_like(mask) if segment == "prefix" else mask)
    means = means_of_loss_sums(sums_of("behavior", inputs, mask))
    empty = {key: value for key, value in means.items() if key.startswith(f"{PREFIX}{segment}/")}
    assert len(empty) == len(means) // 2
    assert set(empty.values()) == {0.0}
    other = "continuation" if segment == "prefix" else "prefix"
    assert means[f"{PREFIX}{other}/tokens"] == mask.sum()
    assert means[f"{PREFIX}{other}/ratio"] > 0


@pytest.mark.parametrize("name", RATIOS)
def test_masked_tokens_do_not_count_whatever_they_hold(name: str) -> None:
    inputs, mask = random_inputs(0)
    assert not mask.all()
    wild = replace(
        inputs,
        log_probs=inputs.log_probs.masked_fill(~mask, math.nan),
        old_log_probs=inputs.old_log_probs.masked_fill(~mask, -math.inf),
        prefix=inputs.prefix | (~mask & (torch.arange(mask.size(1)) % 2 == 0)),
    )
    assert sums_of(name, wild, mask) == sums_of(name, inputs, mask)


def test_where_policies_agree_nothing_is_clipped_and_the_sample_is_whole() -> None:
    inputs, mask = random_inputs(0)
    means = means_of_loss_sums(sums_of("behavior", replace(inputs, old_log_probs=inputs.log_probs), mask))
    for segment in ("prefix", "continuation"):
        assert means[f"{PREFIX}{segment}/ratio"] == 1.0
        assert means[f"{PREFIX}{segment}/effective_sample_size"] == 1.0
        for key in ("kl_k1", "kl_k3", "gradient_clipped", "clip_fraction/low", "clip_fraction/dual"):
            assert means[f"{PREFIX}{segment}/{key}"] == 0.0
