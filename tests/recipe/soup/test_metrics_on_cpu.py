"""Segment metrics against plain loops, and their manners on empty segments and padding rows."""

import math
from dataclasses import replace

import pytest
import torch

from recipe.soup.metrics import TrainRows, groups_with_signal, loss_sums, means_of_loss_sums, train_metrics


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
        prefix=prefix,
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
    tokens = [(b, t) for b in range(5) for t in range(4) if data.prefix[b, t]]
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
    others = [(b, t) for b in range(5) for t in range(4) if data.response_mask[b, t] and not data.prefix[b, t]]
    assert metrics["soup/train/continuation/entropy"] == pytest.approx(sum(float(data.entropy[i]) for i in others) / 7)
    assert metrics["soup/train/mixed/samples"] == 2
    assert metrics["soup/train/mixed/share"] == pytest.approx(0.5)  # of four samples: the padding row is none
    assert metrics["soup/train/mixed/without_continuation"] == 1
    assert metrics["soup/train/continuation/tokens"] == 7
    assert metrics["soup/train/continuation/engine_mismatch/max"] == pytest.approx(1e-4, rel=1e-2)
    assert metrics["soup/train/reward/mixed_minus_pure"] == pytest.approx(0.5)
    assert metrics["soup/train/groups_with_signal"] == pytest.approx(0.5)


def test_keys_do_not_depend_on_the_data_and_nothing_is_nan() -> None:
    data = rows()
    unmixed = replace(data, prefix=torch.zeros_like(data.prefix))
    empty = replace(data, prefix=torch.zeros_like(data.prefix), response_mask=torch.zeros_like(data.response_mask))
    all_history = replace(data, prefix=data.response_mask)
    keys = train_metrics(data).keys()
    for case in (unmixed, empty, all_history):
        metrics = train_metrics(case)
        assert metrics.keys() == keys
        assert all(math.isfinite(value) for value in metrics.values())
    assert train_metrics(unmixed)["soup/train/reward/mixed_minus_pure"] == 0.0


def test_groups_with_signal() -> None:
    assert groups_with_signal(torch.tensor([1.0, 0.0, 1.0, 1.0]), ["a", "a", "b", "b"]) == 0.5
    assert groups_with_signal(torch.empty(0), []) == 0.0


def test_loss_sums_add_up_over_micro_batches() -> None:
    generator = torch.Generator().manual_seed(1)
    log_prob, old, prefix = (torch.randn(6, 5, generator=generator) for _ in range(3))
    advantages = torch.randn(6, 1, generator=generator).expand(-1, 5)
    mask = torch.rand(6, 5, generator=generator) > 0.2

    def sums(part: slice) -> dict[str, float]:
        return loss_sums(log_prob[part], old[part], advantages[part], mask[part], prefix[part] > 0, 0.2, 0.28)

    whole, parts = sums(slice(None)), [sums(slice(0, 2)), sums(slice(2, 6))]
    for key, value in whole.items():
        assert value == pytest.approx(sum(part[key] for part in parts))

    clipped = total = 0.0
    for b in range(6):
        for t in range(5):
            if mask[b, t] and prefix[b, t] > 0:
                ratio, a = math.exp(float(log_prob[b, t] - old[b, t])), float(advantages[b, t])
                total += ratio
                clipped += (a > 0 and ratio > 1.28) or (a < 0 and ratio < 0.8)
    count = whole["soup/loss/prefix/tokens"]
    means = means_of_loss_sums(whole)
    assert means["soup/loss/prefix/ratio"] == pytest.approx(total / count, rel=1e-5)
    assert means["soup/loss/prefix/clip_fraction"] == pytest.approx(clipped / count)


def test_means_of_an_empty_segment_are_zero() -> None:
    zeros = torch.zeros(2, 3)
    means = means_of_loss_sums(loss_sums(zeros, zeros, zeros, torch.ones(2, 3), torch.zeros(2, 3).bool(), 0.2, 0.2))
    assert means["soup/loss/prefix/ratio"] == 0.0
    assert means["soup/loss/continuation/ratio"] == 1.0
