"""Metrics of a step of several updates: as if its samples had been one batch."""

import itertools
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recipe.soup.algorithm.batch import TrainRows, prefix_mask
from recipe.soup.algorithm.batch_metrics import (
    drift_metrics,
    lag_metrics,
    staleness_metrics,
    train_metrics,
    wait_metrics,
)
from recipe.soup.algorithm.several_updates import joined, mean_sums, merged

CURRENT = 6


def batch(lengths: list[int], seed: int) -> TrainRows:
    """Random rows; each starts with tokens of older versions. A length of 0 is a padding row."""
    generator = torch.Generator().manual_seed(seed)
    shape = len(lengths), max(lengths)

    def noise() -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    versions = torch.randint(0, CURRENT + 1, shape, generator=generator).sort(dim=1).values * mask
    return TrainRows(
        response_mask=mask,
        response_ids=torch.zeros(shape, dtype=torch.long),
        is_historical=prefix_mask(versions, mask, CURRENT),
        policy_versions=versions,
        behavior_log_probs=-noise() * mask,
        current_log_probs=-noise() * mask,
        entropy=noise() * mask,
        rewards=torch.randint(0, 2, shape[:1], generator=generator).float(),
        uids=[f"{seed}_{i // 2}" for i in range(shape[0])],
        current_version=CURRENT,
    )


def part(rows: TrainRows, some: slice) -> TrainRows:
    """Some rows, as narrow as they can be."""
    width = max(int(rows.response_mask[some].sum(dim=1).max()), 1)

    def cut(value: Any) -> Any:
        if isinstance(value, int):
            return value
        return value[some][:, :width] if isinstance(value, torch.Tensor) and value.dim() > 1 else value[some]

    return TrainRows(**{field.name: cut(getattr(rows, field.name)) for field in fields(rows)})


LENGTHS = st.lists(st.integers(0, 9), min_size=2, max_size=9).filter(any)


@given(LENGTHS, st.integers(0, 99), st.data())
def test_updates_together_tell_what_one_batch_of_all_their_rows_would(lengths: list[int], seed: int, data: Any) -> None:
    rows = batch(lengths, seed)
    cuts = sorted({0, len(lengths), *data.draw(st.lists(st.integers(1, len(lengths) - 1), max_size=3))})
    updates = [part(rows, slice(*ends)) for ends in itertools.pairwise(cuts)]
    together = joined(updates)
    for measure in (train_metrics, lag_metrics, staleness_metrics, lambda r: drift_metrics(r, True)):
        assert measure(together) == pytest.approx(measure(rows))


def test_what_is_told_beside_the_rows_has_its_rule() -> None:
    samples = "soup/train/samples"
    first = {
        "soup/cost/seed_tokens": 5.0,
        f"{samples}/asked": 32.0,
        f"{samples}/arrived": 32.0,
        f"{samples}/trained": 32.0,
        f"{samples}/lost_share": 0.0,
        "soup/train/broken/no_update": 1.0,
        "soup/train/prefix/tokens": 10.0,
        "soup/train/prefix/trained": 1.0,
        "soup/bank/prefixes": 7,
        **wait_metrics([0] * 32),
    }
    second = dict(first) | {
        "soup/cost/seed_tokens": 2.0,
        f"{samples}/asked": 32.0,
        f"{samples}/arrived": 16.0,
        f"{samples}/trained": 16.0,
        f"{samples}/lost_share": 0.5,
        "soup/train/broken/no_update": 0.0,
        "soup/train/prefix/tokens": 30.0,
        "soup/train/prefix/trained": 0.2,
        "soup/bank/prefixes": 9,
        **wait_metrics([3] * 16),
    }
    told = merged([first, second])
    assert told["soup/cost/seed_tokens"] == 7
    assert told[f"{samples}/asked"] == 64
    assert told[f"{samples}/lost_share"] == 0.25
    assert told["soup/train/broken/no_update"] == 1
    assert told["soup/train/prefix/trained"] == pytest.approx((10 + 0.2 * 30) / 40)
    assert told["soup/train/wait/mean"] == pytest.approx(1)
    assert told["soup/train/wait/max"] == 3
    assert told["soup/bank/prefixes"] == 9
    assert merged([first]) == first


def test_sums_of_the_loss_are_means_over_mini_batches() -> None:
    assert mean_sums([{"a": 1.0, "b": 4.0}, {"a": 3.0, "b": 0.0}]) == {"a": 2.0, "b": 2.0}


def test_staleness_counts_the_current_versions_tokens_with_zero() -> None:
    rows = replace(batch([2, 2], 0), policy_versions=torch.tensor([[4, 6], [6, -2]]))
    assert staleness_metrics(rows) == {"soup/train/staleness/mean": pytest.approx(2 / 3), "soup/train/staleness/max": 2}
    assert wait_metrics([]) == {"soup/train/wait/mean": 0, "soup/train/wait/max": 0}
