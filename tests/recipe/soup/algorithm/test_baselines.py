"""Every baseline against loops, with estimators of our own in float64 and with verl's."""

import math
import statistics
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from verl.trainer.ppo.core_algos import get_adv_estimator_fn

import recipe.soup.verl_adapter.registrations  # noqa: F401  # registers `soup`
from recipe.soup.algorithm.baselines import BASELINES, AdvantageInputs, Estimate

WIDTH = 5
PREFIXES = ((), (5,), (5, 6), (7, 8, 9), (5, 6, 5, 6, 5))
"""One begins with another; the last is a whole response."""


@dataclass(frozen=True)
class Sample:
    prompt: str
    prefix: tuple[int, ...]
    reward: float


def sample_lists(rewards: Sequence[float] = (0.0, 0.25, 0.5, 1.0)) -> st.SearchStrategy[list[Sample]]:
    samples = st.builds(Sample, st.sampled_from("pq"), st.sampled_from(PREFIXES), st.sampled_from(rewards))
    return st.lists(samples, min_size=1, max_size=12)


# ---------------------------------------------------------------------- what is done within a group

Compare = Callable[[float, Sequence[float]], float]
"""From a reward and all rewards of its group, its own included, to its advantage."""


def grpo(own: float, group: Sequence[float]) -> float:
    if len(group) == 1:
        return own / (1 + 1e-6)
    return (own - statistics.fmean(group)) / (statistics.stdev(group) + 1e-6)


def mean_only(own: float, group: Sequence[float]) -> float:
    return own - statistics.fmean(group) if len(group) > 1 else own


def leave_one_out(own: float, group: Sequence[float]) -> float:
    return own - (sum(group) - own) / (len(group) - 1) if len(group) > 1 else own


def estimate_by(compare: Compare) -> Estimate:
    def estimate(rewards: torch.Tensor, groups: Sequence[Hashable]) -> torch.Tensor:
        values = [
            compare(own.item(), [other.item() for other, of in zip(rewards, groups, strict=True) if of == group])
            for own, group in zip(rewards, groups, strict=True)
        ]
        return torch.tensor(values, dtype=torch.float64)

    return estimate


def verls(name: str, by_std: bool = True) -> Estimate:
    """verl's registered estimator, on one number a sample."""
    estimator: Any = get_adv_estimator_fn(name)
    config = OmegaConf.create({"norm_adv_by_std_in_grpo": by_std})

    def estimate(rewards: torch.Tensor, groups: Sequence[Hashable]) -> torch.Tensor:
        index = np.empty(len(groups), dtype=object)
        index[:] = [str(group) for group in groups]
        return estimator(
            token_level_rewards=rewards[:, None].float(),
            response_mask=torch.ones(len(groups), 1),
            index=index,
            config=config,
        )[0][:, 0]

    return estimate


# ---------------------------------------------------------------------- who is compared with whom


def of_prompt(sample: Sample, samples: list[Sample]) -> list[float]:
    return [other.reward for other in samples if other.prompt == sample.prompt]


def among(peers: list[float], sample: Sample, samples: list[Sample], compare: Compare) -> float:
    return compare(sample.reward, peers if len(peers) > 1 else of_prompt(sample, samples))


def group(sample: Sample, samples: list[Sample], compare: Compare) -> tuple[float, float]:
    advantage = compare(sample.reward, of_prompt(sample, samples))
    return advantage, advantage


def separate(sample: Sample, samples: list[Sample], compare: Compare) -> tuple[float, float]:
    own = [other for other in samples if other.prompt == sample.prompt]
    peers = [other.reward for other in own if (len(other.prefix) > 0) == (len(sample.prefix) > 0)]
    advantage = among(peers, sample, samples, compare)
    return advantage, advantage


def two_level(sample: Sample, samples: list[Sample], compare: Compare) -> tuple[float, float]:
    own = [other for other in samples if other.prompt == sample.prompt]
    same = [other.reward for other in own if other.prefix == sample.prefix]
    within = among(same, sample, samples, compare)
    means = {
        prefix: statistics.fmean(other.reward for other in own if other.prefix == prefix)
        for prefix in {other.prefix for other in own if other.prefix}
    }
    if len(means) > 1 and sample.prefix:
        return compare(means[sample.prefix], list(means.values())), within
    return statistics.fmean(compare(reward, of_prompt(sample, samples)) for reward in same), within


EXPECTED: dict[str, Callable[[Sample, list[Sample], Compare], tuple[float, float]]] = {
    "group": group,
    "separate": separate,
    "two_level": two_level,
}
"""On prefix tokens and on all others."""


def inputs_of(samples: list[Sample], estimate: Estimate, dtype: torch.dtype = torch.float64) -> AdvantageInputs:
    ids = torch.randint(5, 10, (len(samples), WIDTH), generator=torch.Generator().manual_seed(len(samples)))
    for row, sample in zip(ids, samples, strict=True):
        row[: len(sample.prefix)] = torch.tensor(sample.prefix)
    return AdvantageInputs(
        rewards=torch.tensor([sample.reward for sample in samples], dtype=dtype),
        prompts=[sample.prompt for sample in samples],
        prefix=torch.arange(WIDTH) < torch.tensor([[len(sample.prefix)] for sample in samples]),
        response_ids=ids,
        estimate=estimate,
    )


def check(name: str, samples: list[Sample], estimate: Estimate, compare: Compare, tolerance: float) -> None:
    advantages = BASELINES[name](inputs_of(samples, estimate))
    assert advantages.shape == (len(samples), WIDTH)
    for row, sample in zip(advantages.tolist(), samples, strict=True):
        on_prefix, elsewhere = EXPECTED[name](sample, samples, compare)
        k = len(sample.prefix)
        assert row == pytest.approx([on_prefix] * k + [elsewhere] * (WIDTH - k), rel=tolerance, abs=tolerance)


def test_every_baseline_has_an_expectation_here() -> None:
    assert EXPECTED.keys() == BASELINES.keys()


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("compare", [grpo, mean_only])
@given(samples=sample_lists())
@settings(deadline=None)
def test_baselines_are_those_of_the_loops(name: str, compare: Compare, samples: list[Sample]) -> None:
    check(name, samples, estimate_by(compare), compare, 1e-9)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize(
    ("estimator", "by_std", "compare"),
    [("soup", True, grpo), ("soup", False, mean_only), ("rloo", True, leave_one_out)],
)
@given(samples=sample_lists())
@settings(deadline=None)
def test_with_verls_estimators_too(
    name: str, estimator: str, by_std: bool, compare: Compare, samples: list[Sample]
) -> None:
    check(name, samples, verls(estimator, by_std), compare, 1e-4)


# ---------------------------------------------------------------------- properties


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("estimator", ["soup", "rloo"])
@given(samples=sample_lists(), reward=st.sampled_from([0.0, 0.5, 1.0, -2.0]))
@settings(deadline=None)
def test_a_constant_reward_has_no_advantage(name: str, estimator: str, samples: list[Sample], reward: float) -> None:
    # A prompt's only sample has its reward as advantage, in verl.
    prompts = [sample.prompt for sample in samples]
    samples = [replace(sample, reward=reward) for sample in samples if prompts.count(sample.prompt) > 1]
    assume(samples)
    assert (BASELINES[name](inputs_of(samples, verls(estimator), torch.float32)) == 0).all()


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("estimate", [estimate_by(grpo), verls("soup"), verls("rloo")], ids=["grpo", "soup", "rloo"])
@given(samples=sample_lists())
@settings(deadline=None)
def test_without_prefixes_every_baseline_is_the_group(name: str, estimate: Estimate, samples: list[Sample]) -> None:
    inputs = inputs_of([replace(sample, prefix=()) for sample in samples], estimate)
    assert torch.equal(BASELINES[name](inputs), BASELINES["group"](inputs))


@pytest.mark.parametrize("name", BASELINES)
@given(samples=sample_lists(), seed=st.integers(0, 10**6))
@settings(deadline=None)
def test_the_order_of_the_samples_does_not_matter(name: str, samples: list[Sample], seed: int) -> None:
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    estimate = estimate_by(mean_only)
    before = BASELINES[name](inputs_of(samples, estimate))
    after = BASELINES[name](inputs_of([samples[i] for i in order], estimate))
    torch.testing.assert_close(before[order], after, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", BASELINES)
@given(samples=sample_lists())
@settings(deadline=None)
def test_a_prompt_does_not_see_another_prompts_rewards(name: str, samples: list[Sample]) -> None:
    estimate = estimate_by(grpo)
    changed = [replace(sample, reward=1 - sample.reward) if sample.prompt == "q" else sample for sample in samples]
    before, after = (BASELINES[name](inputs_of(rows, estimate)) for rows in (samples, changed))
    own = torch.tensor([sample.prompt == "p" for sample in samples])
    torch.testing.assert_close(before[own], after[own], rtol=0, atol=0)


def test_a_group_of_one_falls_back_to_the_prompts_group() -> None:
    samples = [Sample("p", (5,), 1.0), Sample("p", (), 0.0), Sample("p", (), 0.5)]
    for name in ("separate", "two_level"):
        advantages = BASELINES[name](inputs_of(samples, estimate_by(mean_only)))
        assert advantages[0].tolist() == [0.5] * WIDTH  # against the prompt's mean, 0.5
        assert advantages[1].tolist() == [-0.25] * WIDTH  # against the pure mean, 0.25


def test_separate_compares_mixed_with_mixed_and_pure_with_pure() -> None:
    samples = [Sample("p", (5,), 1.0), Sample("p", (7, 8, 9), 0.5), Sample("p", (), 0.0), Sample("p", (), 0.5)]
    advantages = BASELINES["separate"](inputs_of(samples, estimate_by(mean_only)))
    assert advantages[:, 0].tolist() == [0.25, -0.25, -0.25, 0.25]


def test_two_level_compares_prefixes_with_prefixes_and_continuations_within_one() -> None:
    samples = [
        Sample("p", (5, 6), 1.0),
        Sample("p", (7, 8, 9), 0.0),
        Sample("p", (5, 6), 1.0),
        Sample("p", (7, 8, 9), 1.0),
        Sample("p", (), 0.25),
        Sample("p", (), 0.75),
    ]
    advantages = BASELINES["two_level"](inputs_of(samples, estimate_by(mean_only)))
    # The prefixes' means are 1 and 0.5; the pure samples are no prefix.
    assert advantages.tolist() == [
        [0.25, 0.25, 0.0, 0.0, 0.0],
        [-0.25, -0.25, -0.25, -0.5, -0.5],
        [0.25, 0.25, 0.0, 0.0, 0.0],
        [-0.25, -0.25, -0.25, 0.5, 0.5],
        [-0.25] * WIDTH,
        [0.25] * WIDTH,
    ]


def test_two_level_weighs_each_prefix_once_however_many_samples_it_has() -> None:
    samples = [Sample("p", (5,), 1.0)] * 6 + [Sample("p", (7, 8, 9), 0.0)] * 2
    advantages = BASELINES["two_level"](inputs_of(samples, estimate_by(mean_only)))
    assert advantages[:, 0].tolist() == [0.5] * 6 + [-0.5] * 2


@given(samples=sample_lists())
@settings(deadline=None)
def test_within_a_shared_prefix_advantages_cancel_unless_scaled(samples: list[Sample]) -> None:
    nodes = [(sample.prompt, sample.prefix) for sample in samples]
    for estimate in (estimate_by(mean_only), verls("soup", by_std=False)):
        advantages = BASELINES["two_level"](inputs_of(samples, estimate))
        for node in set(nodes):
            prompt, prefix = node
            rows = [row for row, other in enumerate(nodes) if other == node]
            if len(rows) > 1 and len(prefix) < WIDTH:
                assert math.isclose(advantages[rows, -1].sum().item(), 0.0, abs_tol=1e-6), prompt


@given(samples=sample_lists())
@settings(deadline=None)
def test_between_prefixes_of_a_prompt_advantages_cancel_unless_scaled(samples: list[Sample]) -> None:
    advantages = BASELINES["two_level"](inputs_of(samples, estimate_by(mean_only)))
    for prompt in "pq":
        first = {sample.prefix: row for row, sample in enumerate(samples) if sample.prompt == prompt and sample.prefix}
        if len(first) > 1:
            assert math.isclose(advantages[list(first.values()), 0].sum().item(), 0.0, abs_tol=1e-9)
