"""Lookahead's bookkeeping: when the prefixes of which step are sampled, up to the run's end, with refills."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe.soup.prefixes.finished import FinishedSample, fingerprint
from recipe.soup.prefixes.lookahead import LookaheadSource
from recipe.soup.prefixes.prefix import Prefix
from recipe.soup.prefixes.queue import target_version
from recipe.soup.prefixes.requests import PrefixRequest, PromptRequests, SampledPrefix
from recipe.soup.prefixes.resume import resume
from recipe.soup.prefixes.source import RunFacts
from recipe.soup.settings import PrefixLengthSettings, Schedules, ScheduleSettings, SoupSettings

LENGTH = PrefixLengthSettings(distribution="fixed", min=1, max=2)


class Run:
    """A trainer without training: takes, orders and harvests as the real one does, and records versions."""

    def __init__(
        self, lag: int, warm_start: Any, last_step: int, per_step: int = 4, chunk_size: int = 4, **settings: Any
    ) -> None:
        self.per_step, self.chunk_size, self.last_step = per_step, chunk_size, last_step
        self.fetched = self.requested = 0
        self.source = LookaheadSource(
            SoupSettings(lag=lag, warm_start=warm_start, mixed_share=1.0, prefix_length=LENGTH, **settings),
            RunFacts(1, 24, 0, per_step, last_step),
            self.fetch,
        )

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
        """One step. `early`: prefixes arrive before the refill (their hosts were filtered out), not after it."""
        trained = list(self.take(step, self.per_step))
        rows = [PromptRequests() for _ in trained]
        self.source.order(step, rows)
        requests = [request for row in rows for per_sample in row.requests.values() for request in per_sample]
        self.requested = len(requests)
        prefix = Prefix(np.zeros(2, np.int32), np.zeros(2, np.float32), ((step - 1, 2),))
        arrived = [
            SampledPrefix(request.ordinal, 0, prefix, 3, False)
            for request in requests
            if request.ordinal not in (lose or ())
        ]
        if early:
            self.source.harvest(arrived)
        trained += list(self.take(step, refill))
        if not early:
            self.source.harvest(arrived)
        self.source.in_flight.clear()  # as the synchronous trainer does
        return trained


def ages(run: Run) -> list[list[int | None]]:
    """Per step, the lags of the prefixes that it trains on."""
    return [
        [None if version is None else step - 1 - version for _, version in run.step(step)]
        for step in range(1, run.last_step + 1)
    ]


def test_pure_mixes_nothing_before_the_lag_and_the_exact_lag_after() -> None:
    assert ages(Run(3, "pure", last_step=8)) == [[None] * 4] * 3 + [[3] * 4] * 5


def test_fill_samples_for_the_first_steps_with_version_0() -> None:
    assert ages(Run(3, "fill", last_step=8)) == [[None] * 4, [1] * 4, [2] * 4] + [[3] * 4] * 5


def test_ramp_grows_the_lag_by_one_every_other_step() -> None:
    assert ages(Run(3, "ramp", last_step=9)) == [[None] * 4] + [[lag] * 4 for lag in (1, 1, 2, 2, 3, 3, 3, 3)]


def test_ramp_samples_for_no_more_than_two_steps_at_once() -> None:
    run = Run(16, "ramp", last_step=100)
    for step in range(1, 60):
        run.step(step)
        assert run.requested == (2 * run.per_step if 1 < step <= 16 else run.per_step)


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
def test_nothing_is_fetched_or_sampled_for_steps_that_never_come(warm_start: str, lag: int, last_step: int) -> None:
    run = Run(lag, warm_start, last_step)
    for step in range(1, last_step + 1):
        run.step(step)
    assert run.fetched == last_step * run.per_step
    assert len(run.source.bank) == 0
    assert len(run.source.queue) == 0


def test_lag_0_looks_ahead_at_nothing() -> None:
    run = Run(0, "fill", last_step=5)
    assert ages(run) == [[None] * 4] * 5


def assert_exact(run: Run) -> list[int]:
    """Every prefix is of exactly the version that its prompt's draw asks for; returns their ages."""
    ages = []
    for step in range(1, run.last_step + 1):
        for ordinal, version in run.step(step):
            plan = run.source.plan(ordinal, fingerprint(f"prompt {ordinal}"))
            wanted = target_version(step, plan.steps_ahead, run.source.settings.warm_start)
            # What this step's own version would have sampled is not historical.
            assert version == (None if wanted is None or wanted >= step - 1 else wanted)
            ages += [] if version is None else [step - 1 - version]
    assert len(run.source.bank) == len(run.source.queue) == 0
    return ages


@pytest.mark.parametrize("distribution", ["uniform", "geometric"])
@pytest.mark.parametrize("warm_start", ["pure", "fill", "ramp"])
@pytest.mark.parametrize(("lag", "last_step"), [(1, 6), (5, 30), (16, 40), (50, 9)])
@pytest.mark.parametrize("chunk_size", [2, 4, 8])
def test_drawn_lags_are_exact(distribution: str, warm_start: str, lag: int, last_step: int, chunk_size: int) -> None:
    run = Run(lag, warm_start, last_step, per_step=8, chunk_size=chunk_size, lag_distribution=distribution)
    ages = set(assert_exact(run))
    assert max(ages) <= lag
    if distribution == "uniform" and last_step > lag:
        assert ages == set(range(1, lag + 1))


def test_pure_leaves_a_prompt_unmixed_only_while_its_own_version_does_not_exist() -> None:
    run = Run(8, "pure", last_step=30, lag_distribution="uniform")
    mixed = [[version is not None for _, version in run.step(step)] for step in range(1, 31)]
    assert not any(mixed[0])
    assert any(any(some) and not all(some) for some in mixed[1:8])
    assert all(all(some) for some in mixed[8:])


@settings(deadline=None)
@given(
    lag=st.integers(0, 8),
    end=st.integers(0, 8),
    shape=st.sampled_from(["linear", "cosine"]),
    moving=st.none() | st.integers(2, 25),
    warmup=st.integers(0, 6),
    warm_start=st.sampled_from(["pure", "fill", "ramp"]),
    distribution=st.sampled_from(["fixed", "uniform"]),
)
def test_a_lag_that_grows_or_falls_is_exact(
    lag: int, end: int, shape: Any, moving: int | None, warmup: int, warm_start: str, distribution: str
) -> None:
    steps = None if moving is None else warmup + moving
    schedules = Schedules(lag=ScheduleSettings(shape=shape, end=end, steps=steps, warmup=warmup))
    run = Run(lag, warm_start, 20, schedules=schedules, lag_distribution=distribution)
    ages = assert_exact(run)
    assert run.fetched == 20 * run.per_step
    assert max(ages, default=0) <= max(lag, end)


@pytest.mark.parametrize(("lag", "end"), [(1, 7), (7, 1)])
def test_a_scheduled_lag_is_that_of_the_step_that_trains(lag: int, end: int) -> None:
    run = Run(lag, "pure", last_step=20, schedules=Schedules(lag=ScheduleSettings(shape="linear", end=end, steps=13)))
    moved = np.rint(np.linspace(lag, end, 13)).astype(int).tolist() + [end] * 7
    expected = [[wanted if wanted < step else None] * 4 for step, wanted in enumerate(moved, start=1)]
    assert ages(run) == expected


def test_a_lag_that_ends_between_two_updates_is_exact() -> None:
    assert_exact(Run(1, "fill", 20, schedules=Schedules(lag=ScheduleSettings(shape="linear", end=2.7, steps=5))))


class TestSeveral:
    """Four samples a prompt, two prompts a step; step 1 orders the prefixes of step 2."""

    @staticmethod
    def start(**settings: Any) -> tuple[LookaheadSource, list[PrefixRequest]]:
        settings = {"lag": 1, "warm_start": "fill", "mixed_share": 1.0, "prefix_length": LENGTH, **settings}
        fetched = iter(range(0, 100, 2))

        def fetch() -> tuple[None, list[str], int]:
            first = next(fetched)
            return None, [f"prompt {first}", f"prompt {first + 1}"], first

        source = LookaheadSource(SoupSettings(**settings), RunFacts(4, 24, 0, 2, 10), fetch)
        source.take(1)
        rows = [PromptRequests(), PromptRequests()]
        source.order(1, rows)
        return source, [request for row in rows for per_sample in row.requests.values() for request in per_sample]

    @staticmethod
    def answer(token: int, log_prob: float = -1.0) -> SimpleNamespace:
        return SimpleNamespace(token_ids=[token] * 3, log_probs=[log_prob] * 3, extra_fields={"global_steps": 0})

    def test_samples_share_a_prefix_and_half_the_requests_are_made(self) -> None:
        alone, _ = self.start()
        source, requests = self.start(samples_per_prefix=2)
        assert [sorted(request.lengths) for request in requests] == [[0, 1], [0, 1]]
        assert alone.metrics()["soup/cost/seed_requests"] == 8
        assert source.metrics()["soup/cost/seed_requests"] == 4
        source.harvest(
            SampledPrefix.from_answers(request, slot, length, [self.answer(10 * request.ordinal + slot)])
            for request in requests
            for slot, length in request.lengths.items()
        )
        chunk, prefixes = source.take(2)
        for row, slots in enumerate(prefixes):
            first = 10 * (chunk.first_ordinal + row)
            tokens = {sample: prefix.token_ids.tolist() for sample, prefix in slots.items()}
            assert tokens == {0: [first] * 2, 1: [first] * 2, 2: [first + 1] * 2, 3: [first + 1] * 2}

    def test_of_the_candidates_the_most_surprising_is_kept(self) -> None:
        source, requests = self.start(selection="entropic", candidates=3)
        assert [(request.candidates, len(request.lengths)) for request in requests] == [(3, 4), (3, 4)]
        some = [self.answer(7, -0.5), self.answer(8, -2.0), self.answer(9, -1.0)]
        source.harvest(
            SampledPrefix.from_answers(
                request, slot, length, some if slot else some[::2]
            )  # of slot 0 the best got lost
            for request in requests
            for slot, length in request.lengths.items()
        )
        _, prefixes = source.take(2)
        assert [{sample: prefix.token_ids.tolist() for sample, prefix in slots.items()} for slots in prefixes] == [
            {0: [9, 9], 1: [8, 8], 2: [8, 8], 3: [8, 8]}
        ] * 2
        metrics = source.metrics()
        assert metrics["soup/cost/seed_requests"] == 3 * 8
        assert metrics["soup/cost/seeds_lost"] == 2
        assert metrics["soup/cost/seed_tokens"] == 3 * (3 * 8 - 2)

    @pytest.mark.parametrize(("whose", "wanted"), [("trainer", True), ("rollout", False)])
    def test_prompt_ids_are_asked_for_if_the_trainer_computes_the_log_probs(self, whose: str, wanted: bool) -> None:
        _, requests = self.start(behavior_log_probs=whose)
        assert [request.with_prompt for request in requests] == [wanted] * 2


def test_a_fraction_is_of_what_responses_were_like_when_the_prompt_was_fetched(tmp_path: Path) -> None:
    length = PrefixLengthSettings(distribution="fixed", unit="fraction", min=0.0, max=0.5)
    source, requests = TestSeveral.start(prefix_length=length)
    assert source.wants_responses
    assert not TestSeveral.start()[0].wants_responses
    assert [set(request.lengths.values()) for request in requests] == [{6}, {6}]  # half of half of 24
    tokens = np.zeros(20, np.int32)
    source.keep(
        [FinishedSample(fingerprint("prompt 0"), 0, tokens, np.zeros(20, np.float32), np.zeros(20, np.int64), 0.0)]
    )
    source.save(tmp_path)
    resumed, _ = TestSeveral.start(prefix_length=length)
    resumed.load(tmp_path)
    for each in (source, resumed):
        assert set(each.plan(50, fingerprint("prompt 50")).lengths) == {10}


@settings(deadline=None)
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


def test_a_lost_prefix_is_sampled_again_a_step_later() -> None:
    run = Run(3, "pure", last_step=10, chunk_size=1)
    lost = 3 * run.per_step  # first prompt of step 4, due at step 1
    run.step(1, lose={lost})
    run.step(2)
    run.step(3)
    assert dict(run.step(4))[lost] == 1


def test_what_is_still_being_sampled_is_not_ordered_again() -> None:
    """With partial rollouts a prefix may arrive steps after it was ordered; lost or late, it is ordered once."""
    run = Run(3, "fill", last_step=10)
    run.source.take(1)
    rows = [PromptRequests() for _ in range(run.per_step)]
    run.source.order(1, rows)
    requests = [request for row in rows for per_sample in row.requests.values() for request in per_sample]
    assert requests
    run.source.take(2)
    again = [PromptRequests() for _ in range(run.per_step)]
    run.source.order(2, again)
    new = [request for row in again for per_sample in row.requests.values() for request in per_sample]
    assert not {request.ordinal for request in requests} & {request.ordinal for request in new}
    prefix = Prefix(np.zeros(2, np.int32), np.zeros(2, np.float32), ((0, 2),))
    run.source.harvest([SampledPrefix(requests[-1].ordinal, 0, prefix, 3, False)])
    assert (requests[-1].ordinal, 0) not in run.source.in_flight
    assert run.source.bank.slots(requests[-1].ordinal) == {0}


class TestCheckpoint:
    def resumed(self, run: Run, path: Path, step: int) -> Run:
        """A new run of the same data that goes on after `step`, with the dataloader put back to the saved place."""
        run.source.save(path)
        other = Run(run.source.queue.largest_lag, run.source.settings.warm_start, run.last_step)
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
        settings = SoupSettings(lag=2, mixed_share=0.0, prefix_length=LENGTH)
        unmixed = LookaheadSource(settings, RunFacts(1, 24, 0, 4, 10), run.fetch)
        resume(unmixed, tmp_path, 1)
        run.fetched = 4
        chunk, prefixes = unmixed.take(2)
        assert chunk.first_ordinal == 4
        assert not any(prefixes)
