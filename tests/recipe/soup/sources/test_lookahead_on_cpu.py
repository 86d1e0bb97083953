"""Lookahead bookkeeping: which steps are seeded when, up to the run's end, with refills."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.soup.orders import PromptOrders, Seed
from recipe.soup.prefixes import Prefix
from recipe.soup.settings import PrefixLengthSettings, SoupSettings
from recipe.soup.sources.base import RunFacts
from recipe.soup.sources.lookahead import LookaheadSource
from recipe.soup.sources.queue import target_version


class Run:
    """A trainer without training: takes, orders and harvests as the real one does, and records versions."""

    def __init__(self, lag: int, warm_start: str, last_step: int, per_step: int = 4, chunk_size: int = 4) -> None:
        self.per_step, self.chunk_size, self.last_step = per_step, chunk_size, last_step
        self.fetched = self.seeded = 0
        settings = SoupSettings(
            lag=lag, warm_start=warm_start, mixed_share=1.0, prefix_length=PrefixLengthSettings("fixed", 1, 2)
        )
        self.source = LookaheadSource(settings, RunFacts(1, 24, 0, per_step, last_step), self.fetch)

    def fetch(self) -> tuple[None, list[str], int]:
        first, self.fetched = self.fetched, self.fetched + self.chunk_size
        return None, [f"prompt {i}" for i in range(first, self.fetched)], first

    def take(self, step: int, prompts: int) -> Iterator[tuple[int, int | None]]:
        """(ordinal, version of its prefix) of the next prompts."""
        for _ in range(prompts // self.chunk_size):
            chunk, prefixes = self.source.take(step)
            for row, slots in enumerate(prefixes):
                assert chunk.messages[row] == f"prompt {chunk.first_ordinal + row}"
                yield chunk.first_ordinal + row, slots[0].newest if slots else None

    def step(
        self, step: int, refill: int = 0, lose: set[int] | None = None, early: bool = False
    ) -> list[tuple[int, int | None]]:
        """One step. `early`: seeds arrive before the refill (their hosts were filtered out), rather than after it."""
        trained = list(self.take(step, self.per_step))
        rows = [PromptOrders() for _ in trained]
        self.source.order(step, rows)
        orders = [order for row in rows for per_sample in row.seeds.values() for order in per_sample]
        self.seeded = len(orders)
        prefix = Prefix(np.zeros(2, np.int32), np.zeros(2, np.float32), ((step - 1, 2),))
        seeds = [Seed(order.ordinal, 0, prefix, 3, False) for order in orders if order.ordinal not in (lose or ())]
        if early:
            self.source.harvest(seeds)
        trained += list(self.take(step, refill))
        if not early:
            self.source.harvest(seeds)
        return trained


def ages(run: Run) -> list[list[int | None]]:
    """Per step, the lags of the prefixes that it trains on."""
    return [
        [None if version is None else step - 1 - version for _, version in run.step(step)]
        for step in range(1, run.last_step + 1)
    ]


def test_pure_mixes_nothing_before_the_lag_and_the_exact_lag_after() -> None:
    assert ages(Run(3, "pure", last_step=8)) == [[None] * 4] * 3 + [[3] * 4] * 5


def test_fill_seeds_the_first_steps_from_version_0() -> None:
    assert ages(Run(3, "fill", last_step=8)) == [[None] * 4, [1] * 4, [2] * 4] + [[3] * 4] * 5


def test_ramp_grows_the_lag_by_one_every_other_step() -> None:
    assert ages(Run(3, "ramp", last_step=9)) == [[None] * 4] + [[lag] * 4 for lag in (1, 1, 2, 2, 3, 3, 3, 3)]


def test_ramp_seeds_no_more_than_two_steps_at_once() -> None:
    run = Run(16, "ramp", last_step=100)
    for step in range(1, 60):
        run.step(step)
        assert run.seeded == (2 * run.per_step if 1 < step <= 16 else run.per_step)


@pytest.mark.parametrize("warm_start", ["pure", "fill", "ramp"])
@pytest.mark.parametrize("lag", [0, 1, 2, 5, 16])
def test_looking_back_is_the_same_rule(lag: int, warm_start: str) -> None:
    """Which version a step's prefixes have: what the source `snapshot` asks for."""
    for step, lags in enumerate(ages(Run(lag, warm_start, last_step=20)), start=1):
        version = target_version(step, lag, warm_start)
        looked_back = None if version is None or version >= step - 1 else step - 1 - version
        assert lags == [looked_back] * 4


@pytest.mark.parametrize("warm_start", ["pure", "fill", "ramp"])
@pytest.mark.parametrize(("lag", "last_step"), [(0, 4), (2, 6), (5, 3), (100, 7)])
def test_nothing_is_fetched_or_seeded_for_steps_that_never_come(warm_start: str, lag: int, last_step: int) -> None:
    run = Run(lag, warm_start, last_step)
    for step in range(1, last_step + 1):
        run.step(step)
    assert run.fetched == last_step * run.per_step
    assert len(run.source.bank) == 0
    assert len(run.source.queue) == 0


def test_lag_0_looks_ahead_at_nothing() -> None:
    run = Run(0, "fill", last_step=5)
    assert ages(run) == [[None] * 4] * 5


@given(
    lag=st.integers(0, 6),
    warm_start=st.sampled_from(["pure", "fill", "ramp"]),
    refills=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    lost=st.sets(st.integers(0, 60)),
    early=st.booleans(),
)
def test_order_is_kept_and_every_prefix_is_older_whatever_is_refilled_or_lost(
    lag: int, warm_start: str, refills: list[int], lost: set[int], early: bool
) -> None:
    run = Run(lag, warm_start, last_step=len(refills), chunk_size=1)
    trained = []
    for step, refill in enumerate(refills, start=1):
        rows = run.step(step, refill, lose=lost if step % 2 else set(), early=early)
        assert len(rows) == run.per_step + refill
        assert all(version is None or step - 1 - lag <= version < step - 1 for _, version in rows)
        if warm_start == "pure" and step <= lag:
            assert all(version is None for _, version in rows)
        trained += [ordinal for ordinal, _ in rows]
    assert trained == list(range(len(trained)))
    still_to_come = {chunk.first_ordinal + row for chunk, row in run.source.queue}
    assert set(run.source.bank._prompts) <= still_to_come


def test_a_lost_seed_is_sampled_again_a_step_later() -> None:
    run = Run(3, "pure", last_step=10, chunk_size=1)
    lost = 3 * run.per_step  # first prompt of step 4, due at step 1
    run.step(1, lose={lost})
    run.step(2)
    run.step(3)
    assert dict(run.step(4))[lost] == 1


class TestCheckpoint:
    def resumed(self, run: Run, path: Path, step: int) -> Run:
        """A new run of the same data that goes on after `step`, with the dataloader put back to the saved place."""
        run.source.save(path)
        other = Run(run.source.queue.lag, run.source.settings.warm_start, run.last_step)
        other.source.load(path)
        other.fetched = run.source.resume_state(lambda: run.fetched)
        return other

    @pytest.mark.parametrize("warm_start", ["pure", "fill", "ramp"])
    @pytest.mark.parametrize("stop", [1, 2, 5, 9])
    def test_a_resumed_run_trains_on_what_the_first_one_would_have(
        self, warm_start: str, stop: int, tmp_path: Path
    ) -> None:
        whole, stopped = Run(3, warm_start, last_step=10), Run(3, warm_start, last_step=10)
        expected = [whole.step(step) for step in range(1, 11)]
        for step in range(1, stop + 1):
            stopped.step(step)
        resumed = self.resumed(stopped, tmp_path, stop)
        assert [resumed.step(step) for step in range(stop + 1, 11)] == expected[stop:]

    def test_other_data_is_noticed(self, tmp_path: Path) -> None:
        run = Run(3, "fill", last_step=10)
        run.step(1)
        resumed = self.resumed(run, tmp_path, 1)
        resumed.fetched += 4  # the data in another order
        with pytest.raises(RuntimeError, match=r"data\.seed"):
            resumed.step(2)

    def test_without_mixing_the_prefixes_of_a_checkpoint_are_left_alone(self, tmp_path: Path) -> None:
        run = Run(2, "fill", last_step=10)
        run.step(1)
        run.source.save(tmp_path)
        settings = SoupSettings(lag=2, mixed_share=0.0, prefix_length=PrefixLengthSettings("fixed", 1, 2))
        unmixed = LookaheadSource(settings, RunFacts(1, 24, 0, 4, 10), run.fetch)
        unmixed.load(tmp_path)
        run.fetched = 4
        chunk, prefixes = unmixed.take(2)
        assert chunk.first_ordinal == 4
        assert not any(prefixes)
