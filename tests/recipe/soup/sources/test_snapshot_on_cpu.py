"""The source `snapshot` with an engine that answers at once: which version samples for which step, and when."""

from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from recipe.soup.orders import PromptOrders
from recipe.soup.settings import PrefixLengthSettings, SnapshotSettings, SoupSettings
from recipe.soup.sources.base import RunFacts
from recipe.soup.sources.queue import target_version
from recipe.soup.sources.snapshot import SnapshotSource
from verl_ext.historical_policy.snapshots import FOREIGN, Snapshot

LAST_STEP = 20


class Engine:
    """Answers with tokens of the snapshot's version; `slow` leaves the answers to be finished by hand."""

    def __init__(self, slow: bool = False, loses: int | None = None) -> None:
        self.slow, self.loses = slow, loses
        self.taken: list[int] = []
        self.calls: list[tuple[int, list[int]]] = []
        self.pending: list[tuple[Future, list[Any]]] = []

    def take_snapshot(self, version: int) -> Snapshot:
        self.taken.append(version)
        return Snapshot(version, (), 10)

    def sample(self, snapshot: Snapshot, prompts: Any, max_tokens: Any) -> Future:
        self.calls.append((snapshot.version, list(max_tokens)))
        extra = {"global_steps": snapshot.version}
        answers: list[Any] = [
            SimpleNamespace(token_ids=[9] * tokens, log_probs=[-1.0] * tokens, extra_fields=extra)
            for tokens in max_tokens
        ]
        if self.loses is not None:
            answers[self.loses] = None
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
    base: str, engine: Engine, lag: int = 3, warm_start: str = "fill", share: float = 0.5, **snapshot: Any
) -> SnapshotSource:
    chosen = SnapshotSettings(**{"every": 1, **snapshot})
    chosen.keep = chosen.keep or chosen.needed(lag)
    length = PrefixLengthSettings("fixed", 1, 4)
    settings = SoupSettings("snapshot", lag, share, length, warm_start, snapshot=chosen)
    fetched = iter(range(0, 1000, 2))

    def fetch() -> tuple[None, list[Any], int]:
        first = next(fetched)
        return None, [[{"content": str(first + row)}] for row in range(2)], first

    return SnapshotSource(settings, RunFacts(4, 8, 0, 2, LAST_STEP), fetch, engine, base, None)


def step(source: SnapshotSource, number: int) -> set[int]:
    """One step of a trainer; the versions of the prefixes that it trains on."""
    _, prefixes = source.take(number)
    source.order(number, [PromptOrders() for _ in prefixes])
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


def test_pool_draws_from_what_is_kept(base: str) -> None:
    source = make(base, Engine(), policy="pool", keep=4, eviction="log_spaced")
    seen = [step(source, number) for number in range(1, LAST_STEP + 1)]
    assert all(len(versions) == 1 and max(versions) < number for number, versions in enumerate(seen[1:], start=1))
    assert len(set.union(*seen)) >= 6


def test_another_models_weights_are_of_no_version(base: str) -> None:
    source = make(base, Engine(), policy=base)
    assert [step(source, number) for number in range(1, 4)] == [set(), {FOREIGN}, {FOREIGN}]


def test_one_token_more_is_asked_for_and_the_cost_is_counted(base: str) -> None:
    engine = Engine(loses=1)
    source = make(base, engine)
    source.take(2)
    source.order(2, [])
    source.generated(2)
    assert engine.calls[-1] == (0, [5, 5, 5, 5])  # two prompts, half of four samples each
    metrics = source.metrics()
    assert (metrics["soup/cost/seed_requests"], metrics["soup/cost/seeds_lost"]) == (4, 1)
    assert metrics["soup/cost/seed_tokens"] == 15


def test_standalone_samples_while_the_trainer_goes_on(base: str) -> None:
    engine = Engine(slow=True)
    source = make(base, engine, placement="standalone")
    source.take(2)
    source.order(2, [PromptOrders(), PromptOrders()])
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
    source.order(2, [PromptOrders(), PromptOrders()])
    engine.pending[0][0].set_exception(RuntimeError("engine died"))
    with pytest.raises(RuntimeError, match="engine died"):
        source.take(3)


@pytest.mark.parametrize("placement", ["colocated", "standalone"])
def test_with_refills_as_many_samples_are_mixed_as_without(base: str, placement: str) -> None:
    """Two prompts a step and two of a refill; four prefixes were sampled for each step."""
    source = make(base, Engine(), lag=2, placement=placement)
    for number in range(2, 7):
        own = source.take(number)[1]
        source.order(number, [PromptOrders() for _ in own])
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
    stopped.order(5, [PromptOrders() for _ in prefixes])
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
