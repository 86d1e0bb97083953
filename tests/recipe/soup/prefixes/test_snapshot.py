"""The source `snapshot` with an engine that answers at once: which version samples for which step, and when."""

from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file

from recipe.soup.prefixes.queue import target_version
from recipe.soup.prefixes.requests import PromptRequests
from recipe.soup.prefixes.snapshot import SnapshotSource
from recipe.soup.prefixes.source import RunFacts
from recipe.soup.settings import PrefixLengthSettings, Schedules, ScheduleSettings, SnapshotSettings, SoupSettings
from verl_ext.historical_policy.snapshots import FOREIGN, Snapshot

LAST_STEP = 20


class Engine:
    """Answers with tokens of the snapshot's version; `slow` leaves the answers to be finished by hand.

    Args:
        loses: answers that never come.
        log_probs: of the answers' tokens, over and over; its index is what the tokens are.
    """

    def __init__(self, slow: bool = False, loses: tuple[int, ...] = (), log_probs: tuple[float, ...] = (-1.0,)) -> None:
        self.slow, self.loses, self.log_probs = slow, loses, log_probs
        self.taken: list[int] = []
        self.calls: list[tuple[int, list[int]]] = []
        self.pending: list[tuple[Future, list[Any]]] = []

    def take_snapshot(self, version: int) -> Snapshot:
        self.taken.append(version)
        return Snapshot(version, (), 10)

    def sample(self, snapshot: Snapshot, prompts: Any, max_tokens: Any) -> Future:
        self.calls.append((snapshot.version, list(max_tokens)))
        extra = {"global_steps": snapshot.version}
        which = [index % len(self.log_probs) for index in range(len(max_tokens))]
        answers: list[Any] = [
            SimpleNamespace(token_ids=[i] * tokens, log_probs=[self.log_probs[i]] * tokens, extra_fields=extra)
            for i, tokens in zip(which, max_tokens, strict=True)
        ]
        for index in self.loses:
            answers[index] = None
        future: Future = Future()
        if self.slow:
            self.pending.append((future, answers))
        else:
            future.set_result(answers)
        return future


@pytest.fixture
def base(tmp_path: Path) -> str:
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    return str(tmp_path)


def make(
    base: str,
    engine: Engine,
    lag: int = 3,
    warm_start: Any = "fill",
    share: float = 0.5,
    soup: dict[str, Any] | None = None,
    **snapshot: Any,
) -> SnapshotSource:
    """`soup`: further keys of `algorithm.soup`; `snapshot`: those of `algorithm.soup.snapshot`."""
    settings = SoupSettings(
        source="snapshot",
        lag=lag,
        mixed_share=share,
        prefix_length=PrefixLengthSettings(distribution="fixed", min=1, max=4),
        warm_start=warm_start,
        snapshot=SnapshotSettings(**{"every": 1, **snapshot}),
        **(soup or {}),
    )
    settings.snapshot.keep = settings.snapshot.keep or settings.snapshot.needed(settings.largest_lag)
    fetched = iter(range(0, 1000, 2))

    def fetch() -> tuple[None, list[Any], int]:
        first = next(fetched)
        return None, [[{"content": str(first + row)}] for row in range(2)], first

    return SnapshotSource(settings, RunFacts(4, 8, 0, 2, LAST_STEP), fetch, engine, base, None)


def step(source: SnapshotSource, number: int) -> set[int]:
    """One step of a trainer; the versions of the prefixes that it trains on."""
    _, prefixes = source.take(number)
    source.order(number, [PromptRequests() for _ in prefixes])
    source.generated(number)
    source.updated(number)
    versions = {version for slots in prefixes for prefix in slots.values() for version in prefix.versions}
    assert all(len(slots) in (0, 2) for slots in prefixes)
    return versions


@pytest.mark.parametrize("placement", ["colocated", "standalone"])
@pytest.mark.parametrize("warm_start", ["pure", "fill", "ramp"])
@pytest.mark.parametrize("lag", [1, 3, 7])
def test_every_step_has_the_versions_that_the_lookahead_would_have_given_it(
    base: str, lag: int, warm_start: str, placement: str
) -> None:
    source = make(base, Engine(), lag, warm_start, placement=placement)
    for number in range(1, LAST_STEP + 1):
        version = target_version(number, lag, warm_start)
        assert step(source, number) == (set() if version is None or version >= number - 1 else {version})


@pytest.mark.parametrize("placement", ["colocated", "standalone"])
@pytest.mark.parametrize("distribution", ["uniform", "geometric"])
@pytest.mark.parametrize("warm_start", ["pure", "fill", "ramp"])
def test_a_lag_is_drawn_for_each_step(base: str, warm_start: str, distribution: str, placement: str) -> None:
    source = make(base, Engine(), 4, warm_start, placement=placement, soup={"lag_distribution": distribution})
    steps = {number: step(source, number) for number in range(1, LAST_STEP + 1)}
    assert all(len(versions) <= 1 for versions in steps.values())  # one engine holds one version
    ages = {number: number - 1 - version for number, versions in steps.items() for version in versions}
    assert {1, 2, 3} <= set(ages.values()) <= {1, 2, 3, 4}
    if warm_start == "pure":
        assert set(range(5, LAST_STEP + 1)) < set(ages)
        assert 0 < len([number for number in ages if number < 5]) < 4
    else:
        assert set(ages) == set(range(2, LAST_STEP + 1))
    if warm_start == "ramp":
        assert all(age <= number // 2 for number, age in ages.items())


@pytest.mark.parametrize("placement", ["colocated", "standalone"])
@pytest.mark.parametrize(("lag", "end"), [(1, 9), (9, 1), (8, 0), (0, 8)])
@pytest.mark.parametrize("warm_start", ["pure", "fill"])
def test_a_lag_that_grows_or_falls(base: str, warm_start: str, lag: int, end: int, placement: str) -> None:
    """By 1 a step, from step 4 on, after a warm-up."""
    schedule = ScheduleSettings(shape="linear", end=end, steps=4 + abs(end - lag), warmup=3)
    source = make(base, Engine(), lag, warm_start, placement=placement, soup={"schedules": Schedules(lag=schedule)})
    for number in range(1, LAST_STEP + 1):
        since = min(max(number - 4, 0), abs(end - lag))
        moved = lag + since * (1 if end > lag else -1) if number >= 4 else round(lag * number / 4)
        version = target_version(number, moved, warm_start)
        assert step(source, number) == (set() if version is None or version >= number - 1 else {version})


@pytest.mark.parametrize("every", [2, 4])
def test_with_fewer_snapshots_prefixes_are_at_least_as_old_as_the_lag(base: str, every: int) -> None:
    engine = Engine()
    source = make(base, engine, lag=5, every=every)
    for number in range(1, LAST_STEP + 1):
        for version in step(source, number):
            assert version % every == 0
            assert number - 1 - version >= 5 or number <= 5
            assert number - 1 - version < 5 + every
        assert len(source.store.versions) <= source.settings.snapshot.needed(5)
    assert engine.taken == list(range(every, LAST_STEP, every))  # the last version has no use


def test_base_is_version_0_and_needs_no_snapshot(base: str) -> None:
    engine = Engine()
    source = make(base, engine, policy="base")
    assert [step(source, number) for number in range(1, 5)] == [set(), {0}, {0}, {0}]
    assert engine.taken == []


@pytest.mark.parametrize("policy", ["base", "best", "pool", "foreign"])
def test_a_policy_that_does_not_go_by_lag_needs_none(base: str, policy: str) -> None:
    source = make(base, Engine(), lag=0, policy=base if policy == "foreign" else policy)
    assert source.mixes
    versions = [step(source, number) for number in range(1, 6)]
    assert versions[0] == set()
    assert all(len(some) == 1 for some in versions[1:])


@pytest.mark.parametrize("placement", ["colocated", "standalone"])
def test_best_is_the_best_validation_so_far(base: str, placement: str) -> None:
    """Its weights are taken in the step after, before the update; standalone, that step has asked already."""
    engine = Engine()
    source = make(base, engine, policy="best", placement=placement)
    source.validated(0, 0.2)
    seen = []
    for number, score in enumerate([0.1, 0.3, 0.25, 0.4, 0.4, 0.1], start=1):
        seen.append(step(source, number))
        source.validated(number, score)
    later = [{2}, {2}, {4}] if placement == "colocated" else [{0}, {2}, {2}]
    assert seen == [set(), {0}, {0}, *later]
    assert engine.taken == [2, 4]


@pytest.mark.parametrize("placement", ["colocated", "standalone"])
def test_a_resumed_run_takes_the_best_weights_that_were_still_awaited(
    base: str, placement: str, tmp_path: Path
) -> None:
    """A checkpoint after the validation, whose weights the next step takes."""

    def goes_on(source: SnapshotSource) -> list[set[int]]:
        return [step(source, number) for number in range(4, 7)]

    engine = Engine()
    source = make(base, engine, policy="best", placement=placement)
    for number in range(1, 4):
        step(source, number)
    source.validated(3, 0.5)
    source.save(tmp_path)
    resumed_engine = Engine()
    resumed = make(base, resumed_engine, policy="best", placement=placement)
    resumed.load(tmp_path)
    for _ in range(resumed._next_ordinal // 2):
        resumed._fetch()  # as the resumed dataloader does
    costs = [{key: n for key, n in s.metrics().items() if key.startswith("soup/cost/")} for s in (resumed, source)]
    assert costs[0] == costs[1]
    assert costs[0]["soup/cost/seed_requests"] > 0
    assert goes_on(resumed) == goes_on(source)
    assert resumed_engine.taken == engine.taken == [3]


def test_pool_draws_from_what_is_kept(base: str) -> None:
    source = make(base, Engine(), policy="pool", keep=4, eviction="log_spaced")
    seen = [step(source, number) for number in range(1, LAST_STEP + 1)]
    assert all(len(versions) == 1 and max(versions) < number for number, versions in enumerate(seen[1:], start=1))
    assert len(set.union(*seen)) >= 6


def test_another_models_weights_are_of_no_version(base: str) -> None:
    source = make(base, Engine(), policy=base)
    assert [step(source, number) for number in range(1, 4)] == [set(), {FOREIGN}, {FOREIGN}]


def test_one_token_more_is_asked_for_and_the_cost_is_counted(base: str) -> None:
    engine = Engine(loses=(1,))
    source = make(base, engine)
    source.take(2)
    source.order(2, [])
    source.generated(2)
    assert engine.calls[-1] == (0, [5, 5, 5, 5])  # two prompts, half of four samples each
    metrics = source.metrics()
    assert (metrics["soup/cost/seed_requests"], metrics["soup/cost/seeds_lost"]) == (4, 1)
    assert metrics["soup/cost/seed_tokens"] == 15


def prefixes_of(source: SnapshotSource) -> list[dict[int, tuple[int, float]]]:
    """For each prompt of step 3: first token and log-prob of each sample's prefix."""
    source.take(2)
    source.order(2, [PromptRequests(), PromptRequests()])
    source.generated(2)
    _, prefixes = source.take(3)
    return [
        {sample: (int(prefix.token_ids[0]), round(float(prefix.log_probs[0]), 3)) for sample, prefix in slots.items()}
        for slots in prefixes
    ]


@pytest.mark.parametrize("placement", ["colocated", "standalone"])
class TestSeveral:
    """Two prompts a step, four samples each, all mixed."""

    def test_samples_share_a_prefix_and_half_the_requests_are_made(self, base: str, placement: str) -> None:
        engine = Engine(log_probs=(-1.0, -2.0, -3.0, -4.0))
        source = make(base, engine, share=1.0, soup={"samples_per_prefix": 2}, placement=placement)
        a, b, c, d = ((index, -1.0 - index) for index in range(4))
        assert prefixes_of(source) == [{0: a, 1: a, 2: b, 3: b}, {0: c, 1: c, 2: d, 3: d}]
        assert [len(tokens) for _, tokens in engine.calls] == [4]
        assert source.metrics()["soup/cost/seed_requests"] == 4
        alone = Engine()
        prefixes_of(make(base, alone, share=1.0, placement=placement))
        assert [len(tokens) for _, tokens in alone.calls] == [8]

    ENTROPIC: ClassVar = {"selection": "entropic", "candidates": 3}

    def test_of_the_candidates_the_most_surprising_is_kept(self, base: str, placement: str) -> None:
        engine = Engine(log_probs=(-1.0, -0.5, -2.0))
        source = make(base, engine, soup=self.ENTROPIC, placement=placement)
        assert prefixes_of(source) == [{0: (2, -2.0), 1: (2, -2.0)}] * 2
        assert engine.calls == [(0, [5] * 12)]
        metrics = source.metrics()
        assert (metrics["soup/cost/seed_requests"], metrics["soup/cost/seeds_lost"]) == (12, 0)
        assert metrics["soup/cost/seed_tokens"] == 12 * 5

    def test_a_lost_candidate_does_not_lose_the_prefix(self, base: str, placement: str) -> None:
        engine = Engine(log_probs=(-1.0, -0.5, -2.0), loses=(2, 6, 7, 8))
        source = make(base, engine, soup=self.ENTROPIC, placement=placement)
        # Of the first prefix the best candidate is lost; of the third all are, and nobody else's takes its place.
        assert prefixes_of(source) == [{0: (0, -1.0), 1: (2, -2.0)}, {1: (2, -2.0)}]
        metrics = source.metrics()
        assert (metrics["soup/cost/seed_requests"], metrics["soup/cost/seeds_lost"]) == (12, 4)
        assert metrics["soup/cost/seed_tokens"] == 8 * 5


def test_standalone_samples_while_the_trainer_goes_on(base: str) -> None:
    engine = Engine(slow=True)
    source = make(base, engine, placement="standalone")
    source.take(2)
    source.order(2, [PromptRequests(), PromptRequests()])
    future, answers = engine.pending[-1]  # asked already
    source.generated(2)
    source.updated(2)
    assert not future.done()  # and nobody has waited for it
    future.set_result(answers)
    _, prefixes = source.take(3)
    assert all(len(slots) == 2 for slots in prefixes)


def test_a_failing_engine_ends_the_run(base: str) -> None:
    engine = Engine(slow=True)
    source = make(base, engine, placement="standalone")
    source.take(2)
    source.order(2, [PromptRequests(), PromptRequests()])
    engine.pending[0][0].set_exception(RuntimeError("engine died"))
    with pytest.raises(RuntimeError, match="engine died"):
        source.take(3)


@pytest.mark.parametrize("placement", ["colocated", "standalone"])
def test_with_refills_as_many_samples_are_mixed_as_without(base: str, placement: str) -> None:
    """Two prompts a step and two of a refill; four prefixes were sampled for each step."""
    source = make(base, Engine(), lag=2, placement=placement)
    source.updated(1)
    for number in range(2, 7):
        own = source.take(number)[1]
        source.order(number, [PromptRequests() for _ in own])
        refill = source.take(number)[1]
        source.generated(number)
        source.updated(number)
        mixed = sum(map(len, own)), sum(map(len, refill))
        if number > 2:  # colocated, they are sampled after the refill; standalone before it, which then gets them
            assert mixed == ((4, 0) if placement == "colocated" else (0, 4))


@pytest.mark.parametrize("placement", ["colocated", "standalone"])
def test_a_resumed_run_has_the_prefixes_that_were_being_sampled(base: str, placement: str, tmp_path: Path) -> None:
    """In verl's order: a checkpoint is saved before its own version would be kept."""
    whole, stopped = (make(base, Engine(), lag=2, placement=placement) for _ in range(2))
    expected = [step(whole, number) for number in range(1, 9)]
    for number in range(1, 5):
        step(stopped, number)
    _, prefixes = stopped.take(5)
    stopped.order(5, [PromptRequests() for _ in prefixes])
    stopped.generated(5)
    stopped.save(tmp_path)
    resumed = make(base, Engine(), lag=2, placement=placement)
    resumed.load(tmp_path)
    for _ in range(resumed._next_ordinal // 2):
        resumed._fetch()
    resumed.updated(5)  # as the trainer does it when it resumes
    assert [step(resumed, number) for number in range(6, 9)] == expected[5:]


@pytest.mark.parametrize(("share", "lag", "policy"), [(0.0, 3, "lagged"), (0.5, 0, "lagged"), (0.0, 3, "base")])
def test_unmixed_it_does_nothing(base: str, share: float, lag: int, policy: str) -> None:
    engine = Engine()
    source = make(base, engine, lag, share=share, policy=policy)
    assert [step(source, number) for number in range(1, 5)] == [set()] * 4
    assert engine.taken == engine.calls == []
