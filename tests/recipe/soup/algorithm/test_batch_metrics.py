"""Segment metrics against plain loops, and their manners on empty segments and padding rows."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe.soup.algorithm.batch import NOBODY, TrainRows, prefix_mask
from recipe.soup.algorithm.batch_metrics import (
    divergence,
    drift_metrics,
    entropy_by_position,
    groups_with_signal,
    lag_metrics,
    train_metrics,
)


def rows() -> TrainRows:
    """Two groups of two; row 0 has 2 historical tokens, row 2 is complete history; row 4 is verl's padding."""
    response_mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    versions = torch.tensor([[3, 3, 5, 0], [5, 5, 0, 0], [4, 4, 0, 0], [5, 5, 5, 5], [3, 3, 5, 0]])
    prefix = (versions < 5) & response_mask
    generator = torch.Generator().manual_seed(0)
    behavior = -torch.rand(5, 4, generator=generator)
    current = torch.where(prefix, -torch.rand(5, 4, generator=generator), behavior + 1e-4)
    return TrainRows(
        response_mask=response_mask,
        response_ids=torch.zeros_like(response_mask, dtype=torch.long),
        is_historical=prefix,
        policy_versions=versions,
        behavior_log_probs=behavior,
        current_log_probs=current,
        entropy=torch.rand(5, 4, generator=generator),
        rewards=torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0]),
        uids=["a", "a", "b", "b", "pad"],
        current_version=5,
    )


def test_against_loops() -> None:
    data = rows()
    metrics = train_metrics(data)
    tokens = [(b, t) for b in range(5) for t in range(4) if data.is_historical[b, t]]
    ratios = [math.exp(float(data.current_log_probs[i]) - float(data.behavior_log_probs[i])) for i in tokens]
    assert metrics["soup/train/prefix/tokens"] == 4
    assert metrics["soup/train/prefix/share"] == pytest.approx(4 / 11)
    assert metrics["soup/train/prefix/ratio_at_start/mean"] == pytest.approx(sum(ratios) / 4)
    assert metrics["soup/train/prefix/ratio_at_start/max"] == pytest.approx(max(ratios))
    assert metrics["soup/train/prefix/ratio_at_start/min"] == pytest.approx(min(ratios))
    assert metrics["soup/train/prefix/lag/mean"] == pytest.approx((2 + 2 + 1 + 1) / 4)
    assert metrics["soup/train/prefix/lag/max"] == 2
    assert metrics["soup/train/prefix/length/mean"] == 2
    assert metrics["soup/train/prefix/entropy"] == pytest.approx(sum(float(data.entropy[i]) for i in tokens) / 4)
    others = [(b, t) for b in range(5) for t in range(4) if data.response_mask[b, t] and not data.is_historical[b, t]]
    assert metrics["soup/train/continuation/entropy"] == pytest.approx(sum(float(data.entropy[i]) for i in others) / 7)
    assert metrics["soup/train/mixed/samples"] == 2
    assert metrics["soup/train/mixed/share"] == pytest.approx(0.5)  # of four samples: the padding row is none
    assert metrics["soup/train/mixed/without_continuation"] == 1
    assert metrics["soup/train/continuation/tokens"] == 7
    assert metrics["soup/train/continuation/engine_mismatch/max"] == pytest.approx(1e-4, rel=1e-2)
    assert metrics["soup/train/reward/mixed_minus_pure"] == pytest.approx(0.5)
    assert metrics["soup/train/groups_with_signal"] == pytest.approx(0.5)


def test_drift_says_whether_rounding_is_in_it() -> None:
    data = rows()
    tokens = [(b, t) for b in range(5) for t in range(4) if data.is_historical[b, t]]
    moved = [abs(float(data.current_log_probs[i]) - float(data.behavior_log_probs[i])) for i in tokens]
    for by_trainer, name in ((True, "drift"), (False, "drift_and_mismatch")):
        metrics = drift_metrics(data, by_trainer)
        assert metrics == pytest.approx(
            {f"soup/train/prefix/{name}/mean": sum(moved) / 4, f"soup/train/prefix/{name}/max": max(moved)}
        )
    unmixed = drift_metrics(replace(data, is_historical=torch.zeros_like(data.is_historical)), True)
    assert set(unmixed.values()) == {0.0}


def test_keys_do_not_depend_on_the_data_and_nothing_is_nan() -> None:
    data = rows()
    unmixed = replace(data, is_historical=torch.zeros_like(data.is_historical))
    empty = replace(
        data, is_historical=torch.zeros_like(data.is_historical), response_mask=torch.zeros_like(data.response_mask)
    )
    all_history = replace(data, is_historical=data.response_mask)
    keys = train_metrics(data).keys()
    for case in (unmixed, empty, all_history):
        metrics = train_metrics(case)
        assert metrics.keys() == keys
        assert all(math.isfinite(value) for value in metrics.values())
    assert train_metrics(unmixed)["soup/train/reward/mixed_minus_pure"] == 0.0


def test_a_reward_that_is_not_finite_is_no_signal() -> None:
    nan, inf = float("nan"), float("inf")
    rewards = torch.tensor([1.0, nan, nan, nan, inf, 0.0, 1.0, 0.0])
    assert groups_with_signal(rewards, list("aabbccdd")) == 0.25


def test_groups_with_signal() -> None:
    assert groups_with_signal(torch.tensor([1.0, 0.0, 1.0, 1.0]), ["a", "a", "b", "b"]) == 0.5
    assert groups_with_signal(torch.empty(0), []) == 0.0


# ---------------------------------------------------------------------- how far two policies are apart


@given(log_ratios=st.lists(st.floats(-6, 6), min_size=1, max_size=20))
@settings(deadline=None)
def test_divergence_against_loops(log_ratios: list[float]) -> None:
    ratios, n = [math.exp(value) for value in log_ratios], len(log_ratios)
    assert divergence(torch.tensor(log_ratios, dtype=torch.float64)) == pytest.approx(
        {
            "kl_k1": -sum(log_ratios) / n,
            "kl_k3": sum(ratio - 1 - value for ratio, value in zip(ratios, log_ratios, strict=True)) / n,
            "effective_sample_size": sum(ratios) ** 2 / n / sum(ratio**2 for ratio in ratios),
        },
        rel=1e-9,
        abs=1e-12,
    )


def test_divergence_is_the_kullback_leibler_divergence_on_a_fair_sample() -> None:
    mu, pi = [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]
    sample = [0, 0, 1, 2]  # each outcome as often as mu says
    log_ratio = torch.tensor([math.log(pi[i] / mu[i]) for i in sample], dtype=torch.float64)
    exact = sum(m * math.log(m / p) for m, p in zip(mu, pi, strict=True))
    figures = divergence(log_ratio)
    assert figures["kl_k1"] == pytest.approx(exact)
    assert figures["kl_k3"] == pytest.approx(exact)
    assert figures["effective_sample_size"] == pytest.approx(1 / sum(p**2 / m for m, p in zip(mu, pi, strict=True)))


@given(log_ratios=st.lists(st.floats(-80, 80, width=32), min_size=1, max_size=20))
@settings(deadline=None)
def test_divergence_is_not_negative_and_the_effective_sample_is_a_share(log_ratios: list[float]) -> None:
    figures = divergence(torch.tensor(log_ratios))
    assert figures["kl_k3"] > -1e-15
    assert 0 < figures["effective_sample_size"] <= 1 + 1e-12
    assert figures["effective_sample_size"] >= 1 / len(log_ratios) - 1e-12


def test_divergence_of_a_policy_from_itself_and_of_nothing() -> None:
    assert divergence(torch.zeros(3)) == {"kl_k1": 0.0, "kl_k3": 0.0, "effective_sample_size": 1.0}
    assert divergence(torch.empty(0)) == {"kl_k1": 0.0, "kl_k3": 0.0, "effective_sample_size": 0.0}


def test_train_metrics_measure_the_divergence_on_the_prefix_alone() -> None:
    data = rows()
    metrics = train_metrics(data)
    on_prefix = divergence((data.current_log_probs - data.behavior_log_probs)[data.is_historical])
    assert on_prefix["kl_k3"] > 1e-3
    for key, value in on_prefix.items():
        assert metrics[f"soup/train/prefix/{key}_at_start"] == pytest.approx(value)


# ---------------------------------------------------------------------- entropy by position


def with_lengths(lengths: list[int], entropy: torch.Tensor) -> TrainRows:
    mask = torch.arange(entropy.size(1)) < torch.tensor(lengths)[:, None]
    return TrainRows(
        response_mask=mask,
        response_ids=torch.zeros_like(mask, dtype=torch.long),
        is_historical=torch.zeros_like(mask),
        policy_versions=torch.zeros(entropy.shape, dtype=torch.long),
        behavior_log_probs=torch.zeros_like(entropy),
        current_log_probs=torch.zeros_like(entropy),
        entropy=entropy,
        rewards=torch.zeros(len(lengths)),
        uids=["a"] * len(lengths),
        current_version=0,
    )


def with_tools(data: TrainRows) -> TrainRows:
    """The same samples, with two tokens of a tool behind the second token of each."""

    def insert(tensor: torch.Tensor, value: float) -> torch.Tensor:
        answers = torch.full_like(tensor[:, :2], value)
        return torch.cat([tensor[:, :2], answers, tensor[:, 2:]], dim=1)

    return replace(
        data,
        response_mask=insert(data.response_mask, False),
        response_ids=insert(data.response_ids, 9),
        is_historical=insert(data.is_historical, False),
        policy_versions=insert(data.policy_versions, NOBODY),
        behavior_log_probs=insert(data.behavior_log_probs, 0),
        current_log_probs=insert(data.current_log_probs, -9),
        entropy=insert(data.entropy, 9),
    )


def test_what_tools_wrote_is_only_counted() -> None:
    """Padding rows repeat the first sample's versions, also those of nobody: they count as nothing."""
    data = rows()
    plain, tools = train_metrics(data), train_metrics(with_tools(data))
    assert tools.pop("soup/train/tool_tokens") == 8
    assert plain.pop("soup/train/tool_tokens") == 0
    assert tools == pytest.approx(plain)
    assert lag_metrics(with_tools(data)) == pytest.approx(lag_metrics(data))
    assert drift_metrics(with_tools(data), False) == pytest.approx(drift_metrics(data, False))


def test_nobody_is_no_history() -> None:
    """Also where a token counts, as one of a demonstration would."""
    versions = torch.tensor([[NOBODY, -1, 3, 5]])
    assert prefix_mask(versions, torch.ones(1, 4), 5).tolist() == [[False, True, True, False]]
    assert prefix_mask(versions, torch.tensor([[1, 1, 0, 1]]), 5).tolist() == [[False, True, False, False]]


def quarters(data: TrainRows) -> list[float]:
    metrics = entropy_by_position(data)
    assert list(metrics) == [f"soup/train/entropy/quarter_{i}" for i in (1, 2, 3, 4)]
    return list(metrics.values())


def test_each_quarter_of_a_response_has_its_own_mean() -> None:
    entropy = torch.tensor([[0.0, 2.0, 3.0, 3.0, 1.0, 5.0, 7.0, 9.0], [4.0, 1.0, 6.0, 0.0, 99.0, 99.0, 99.0, 99.0]])
    # The second response is four tokens long, so each of them is a quarter.
    assert quarters(with_lengths([8, 4], entropy)) == pytest.approx([6 / 3, 7 / 3, 12 / 3, 16 / 3])


@given(lengths=st.lists(st.integers(0, 11), min_size=1, max_size=6), seed=st.integers(0, 10**6))
@settings(deadline=None)
def test_entropy_by_position_against_loops(lengths: list[int], seed: int) -> None:
    entropy = torch.rand(len(lengths), 11, generator=torch.Generator().manual_seed(seed))
    expected: list[list[float]] = [[], [], [], []]
    for b, length in enumerate(lengths):
        for t in range(length):
            i = next(i for i in range(4) if t < (i + 1) * length / 4)
            expected[i].append(entropy[b, t].item())
    means = [sum(values) / len(values) if values else 0.0 for values in expected]
    assert quarters(with_lengths(lengths, entropy)) == pytest.approx(means)


def test_entropy_of_padding_rows_does_not_count() -> None:
    entropy = torch.tensor([[1.0, 1.0, 1.0, 1.0], [math.nan, 9.0, 9.0, 9.0]])
    assert quarters(with_lengths([4, 0], entropy)) == [1.0, 1.0, 1.0, 1.0]
    assert quarters(with_lengths([0, 0], entropy)) == [0.0, 0.0, 0.0, 0.0]


# ---------------------------------------------------------------------- prefix tokens by age

NAMES = ("1", "2_to_3", "4_to_7", "8_to_15", "16_to_31", "32_to_63", "64_or_more")


def aged(lags: list[int], log_ratios: list[float], own: list[bool] | None = None) -> TrainRows:
    """One row; every token is prefix, unless `own` says that the current version sampled it."""
    mask = torch.ones(1, len(lags), dtype=torch.bool)
    prefix = mask & ~torch.tensor([own or [False] * len(lags)])
    return TrainRows(
        response_mask=mask,
        response_ids=torch.zeros_like(mask, dtype=torch.long),
        is_historical=prefix,
        policy_versions=1000 - torch.tensor([lags]),
        behavior_log_probs=torch.full((1, len(lags)), -1.0, dtype=torch.float64),
        current_log_probs=torch.tensor([log_ratios], dtype=torch.float64) - 1.0,
        entropy=torch.zeros(1, len(lags)),
        rewards=torch.zeros(1),
        uids=["a"],
        current_version=1000,
    )


@pytest.mark.parametrize(
    ("lag", "name"),
    [
        (1, "1"), (2, "2_to_3"), (3, "2_to_3"), (4, "4_to_7"), (7, "4_to_7"), (8, "8_to_15"), (15, "8_to_15"),
        (16, "16_to_31"), (31, "16_to_31"), (32, "32_to_63"), (63, "32_to_63"), (64, "64_or_more"),
        (1000, "64_or_more"),
    ],
)  # fmt: skip
def test_every_lag_has_one_bucket(lag: int, name: str) -> None:
    metrics = lag_metrics(aged([lag, lag], [0.0, 1.0]))
    assert {other for other in NAMES if metrics[f"soup/train/lag_{other}/tokens"]} == {name}
    assert metrics[f"soup/train/lag_{name}/tokens"] == 2
    assert metrics[f"soup/train/lag_{name}/ratio_at_start"] == pytest.approx((1 + math.e) / 2)


@given(tokens=st.lists(st.tuples(st.integers(1, 200), st.floats(-3, 3), st.booleans()), min_size=1, max_size=30))
@settings(deadline=None)
def test_lag_metrics_against_loops(tokens: list[tuple[int, float, bool]]) -> None:
    metrics = lag_metrics(aged([lag for lag, _, _ in tokens], [x for _, x, _ in tokens], [own for _, _, own in tokens]))
    by_name: dict[str, list[float]] = {name: [] for name in NAMES}
    for lag, log_ratio, own in tokens:
        if not own:
            by_name[NAMES[min(int(math.log2(lag)), 6)]].append(log_ratio)
    for name, log_ratios in by_name.items():
        n, ratios = len(log_ratios), [math.exp(x) for x in log_ratios]
        figures = {
            "tokens": n,
            "ratio_at_start": sum(ratios) / n if n else 0.0,
            "kl_k1_at_start": -sum(log_ratios) / n if n else 0.0,
            "kl_k3_at_start": sum(r - 1 - math.log(r) for r in ratios) / n if n else 0.0,
            "effective_sample_size_at_start": sum(ratios) ** 2 / n / sum(r * r for r in ratios) if n else 0.0,
        }
        for key, value in figures.items():
            assert metrics.pop(f"soup/train/lag_{name}/{key}") == pytest.approx(value, rel=1e-9, abs=1e-9)
    assert not metrics


def test_tokens_of_a_model_without_a_version_have_no_lag() -> None:
    metrics = lag_metrics(aged([1001, 1005], [0.5, 0.5]))
    assert set(metrics.values()) == {0.0}
    assert train_metrics(aged([1001, 1005], [0.5, 0.5]))["soup/train/prefix/lag/mean"] == 0.0


def test_keys_of_lag_metrics_do_not_depend_on_the_data_and_nothing_is_nan() -> None:
    data = rows()
    empty = replace(data, is_historical=torch.zeros_like(data.is_historical))
    assert lag_metrics(empty).keys() == lag_metrics(data).keys()
    assert set(lag_metrics(empty).values()) == {0.0}
    assert lag_metrics(data)["soup/train/lag_1/tokens"] == 2
    assert lag_metrics(data)["soup/train/lag_2_to_3/tokens"] == 2
