"""Lookahead bookkeeping: which steps are seeded when, up to the run's end, with refills."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.soup.lookahead import Chunk, LookaheadQueue
from recipe.soup.prefixes import Prefix, PrefixBank


class Run:
    """A trainer without training: pops, tops up and seeds as the real one, and records ages."""

    def __init__(self, lag: int, warm_start: str, last_step: int, per_step: int = 4, chunk_size: int = 4) -> None:
        self.queue = LookaheadQueue(lag, warm_start, per_step, last_step)
        self.bank = PrefixBank()
        self.per_step, self.chunk_size, self.last_step = per_step, chunk_size, last_step
        self.fetched = 0

    def fetch(self) -> Chunk:
        chunk = Chunk(None, self.chunk_size, self.fetched)
        self.fetched += self.chunk_size
        return chunk

    def take(self, step: int, prompts: int) -> Iterator[tuple[int, int | None]]:
        """(ordinal, version of its prefix) of the next prompts."""
        for _ in range(prompts // self.chunk_size):
            chunk = self.queue.pop() or self.fetch()
            for row in range(chunk.size):
                slots = self.bank.take(chunk.first_ordinal + row)
                yield chunk.first_ordinal + row, slots[0].version if slots and self.queue.mixes(step) else None

    def step(self, step: int, refill: int = 0, lose: set[int] | None = None) -> list[tuple[int, int | None]]:
        trained = list(self.take(step, self.per_step))
        self.queue.top_up(step, self.fetch)
        due = [chunk.first_ordinal + row for chunk, row in self.queue.due(step)]
        trained += list(self.take(step, refill))
        front = self.queue.front
        for ordinal in due:
            lost = ordinal in (lose or ()) or front is None or ordinal < front.first_ordinal
            if not lost and not self.bank.slots(ordinal):
                self.bank.put(ordinal, 0, Prefix(np.zeros(2, np.int32), np.zeros(2, np.float32), version=step - 1))
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
    seeded = []
    for step in range(1, 60):
        before = len(run.bank)
        trained = sum(version is not None for _, version in run.step(step))
        seeded.append(len(run.bank) - before + trained)
    assert max(seeded) <= 2 * run.per_step


@pytest.mark.parametrize("warm_start", ["pure", "fill", "ramp"])
@pytest.mark.parametrize(("lag", "last_step"), [(0, 4), (2, 6), (5, 3), (100, 7)])
def test_nothing_is_fetched_or_seeded_for_steps_that_never_come(warm_start: str, lag: int, last_step: int) -> None:
    run = Run(lag, warm_start, last_step)
    for step in range(1, last_step + 1):
        run.step(step)
    assert run.fetched == last_step * run.per_step
    assert len(run.bank) == 0
    assert len(run.queue) == 0


def test_lag_0_looks_ahead_at_nothing() -> None:
    run = Run(0, "fill", last_step=5)
    assert ages(run) == [[None] * 4] * 5


@given(
    lag=st.integers(0, 6),
    warm_start=st.sampled_from(["pure", "fill", "ramp"]),
    refills=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    lost=st.sets(st.integers(0, 60)),
)
def test_order_is_kept_and_every_prefix_is_older_whatever_is_refilled_or_lost(
    lag: int, warm_start: str, refills: list[int], lost: set[int]
) -> None:
    run = Run(lag, warm_start, last_step=len(refills), chunk_size=1)
    trained = []
    for step, refill in enumerate(refills, start=1):
        rows = run.step(step, refill, lose=lost if step % 2 else set())
        assert len(rows) == run.per_step + refill
        assert all(version is None or step - 1 - lag <= version < step - 1 for _, version in rows)
        if warm_start == "pure" and step <= lag:
            assert all(version is None for _, version in rows)
        trained += [ordinal for ordinal, _ in rows]
    assert trained == list(range(len(trained)))
    front = run.queue.front
    assert all(ordinal >= front.first_ordinal for ordinal in run.bank._prompts) if front else len(run.bank) == 0


def test_a_lost_seed_is_sampled_again_a_step_later() -> None:
    run = Run(3, "pure", last_step=10, chunk_size=1)
    lost = 3 * run.per_step  # first prompt of step 4, due at step 1
    run.step(1, lose={lost})
    run.step(2)
    run.step(3)
    assert dict(run.step(4))[lost] == 1
