"""`placement=shared`: which adapter samples for which prompt, and what is kept, without an engine."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recipe.soup.bank_origin import PLACEMENT
from recipe.soup.prefixes.past_weights import SNAPSHOT_FOLDER
from recipe.soup.prefixes.requests import SampledPrefix
from recipe.soup.prefixes.resume import check_bank
from recipe.soup.prefixes.shared import SharedSource
from recipe.soup.prefixes.source import RunFacts
from recipe.soup.settings import SoupSettings
from verl_ext.health import RunEndedError
from verl_ext.historical_policy.snapshots import ADAPTER_FILES, FOREIGN, Snapshot

STEPS, PROMPTS, SAMPLES = 20, 4, 6


class Engine:
    """Writes folders as PEFT would."""

    def __init__(self, folder: Path, at_once: int = 1) -> None:
        self.folder, self.at_once = folder, at_once
        self.why: str | None = None

    def take_snapshot(self, version: int) -> Snapshot:
        folder = self.folder / f"version_{version}"
        folder.mkdir(parents=True, exist_ok=True)
        for name in ADAPTER_FILES:
            (folder / name).unlink(missing_ok=True)
            (folder / name).write_text(json.dumps(version))
        return Snapshot(version, tuple(folder / name for name in ADAPTER_FILES), 2)

    def fault(self) -> str | None:
        return self.why


def made(folder: Path, at_once: int = 1, **keys: Any) -> SharedSource:
    snapshot = {"placement": "shared", "every": 1, **keys.pop("snapshot", {})}
    given = {"source": "snapshot", "lag": 2, "warm_start": "pure", "prefix_length": {"max": 5}}
    settings = SoupSettings.model_validate({**given, **keys, "snapshot": snapshot})
    settings.fill(16)
    origin = {"algorithm.soup.source": "snapshot", PLACEMENT: "shared"}
    facts = RunFacts(SAMPLES, 16, 7, PROMPTS, STEPS, origin=origin)
    count = iter(range(10**6))
    messages = lambda: [[{"role": "user", "content": str(next(count))}] for _ in range(PROMPTS)]  # noqa: E731
    engine = Engine(folder / "kept", at_once)
    return SharedSource(settings, facts, lambda: (None, messages(), None), engine, str(folder / "zero"), engine.folder)


def steps(source: SharedSource, first: int, last: int) -> dict[int, list[dict[int, Any]]]:
    """The late requests of each step."""
    asked = {}
    for step in range(first, last + 1):
        chunk, prefixes = source.take(step)
        assert prefixes == [{}] * PROMPTS
        asked[step] = source.late(chunk, step)
        source.generated(step)
        source.updated(step)
    return asked


def versions(rows: list[dict[int, Any]]) -> set[int]:
    return {request.adapter.version for row in rows for request in row.values()}


def test_lagged_asks_for_exactly_the_version_of_lag_updates_ago_just_in_time(tmp_path: Path) -> None:
    asked = steps(made(tmp_path), 1, 8)
    for step, rows in asked.items():
        assert versions(rows) == ({step - 3} if step >= 3 else set())
        for row in rows:
            assert sorted(row) == (list(range(3)) if step >= 3 else [])
            for slot, request in row.items():
                assert list(request.lengths) == [slot]
                assert 1 <= request.lengths[slot] <= 5
                version = step - 3
                folder = tmp_path / (f"kept/version_{version}" if version else "zero")
                assert request.adapter.folder == str(folder)
    assert len({request.ordinal for rows in asked.values() for row in rows for request in row.values()}) == 6 * PROMPTS


def test_only_what_the_lag_needs_is_kept_on_disk(tmp_path: Path) -> None:
    source = made(tmp_path)
    steps(source, 1, 8)
    kept = {path.parent.name for path in (tmp_path / "kept").glob("*/*")}
    assert kept == {"version_6", "version_7", "version_8"}
    assert source.metrics()["soup/snapshots/bytes"] == 6


def test_each_prompt_of_a_pool_has_one_of_at_most_so_many_drawn_versions(tmp_path: Path) -> None:
    source = made(tmp_path, at_once=3, snapshot={"policy": "pool", "keep": 6})
    seen = [versions(rows) for rows in steps(source, 1, STEPS - 1).values()]
    for step, found in enumerate(seen, start=1):
        assert len(found) <= 3
        assert all(version < step - 1 for version in found)
        assert bool(found) == (step >= 2)  # version 0 before there is another
    assert max(map(len, seen)) == 3
    ages = [step - 1 - version for step, found in enumerate(seen, start=1) for version in found if step > 8]
    assert set(ages) == set(range(1, 6))  # the six that are kept, but for the current one


@pytest.mark.parametrize(("policy", "expected"), [("base", 0), ("other", FOREIGN)])
def test_the_base_model_and_another_runs_adapter(policy: str, expected: int, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    source = made(tmp_path, snapshot={"policy": policy if policy == "base" else str(folder)})
    asked = steps(source, 1, 3)
    assert versions(asked[3]) == {expected}
    assert {request.adapter.folder for row in asked[3] for request in row.values()} == {
        str(tmp_path / "zero") if policy == "base" else str(folder)
    }
    assert versions(asked[1]) == (set() if policy == "base" else {FOREIGN})  # in step 1 the base is the current one


def test_the_best_version_is_kept_from_the_step_after_its_validation(tmp_path: Path) -> None:
    source = made(tmp_path, snapshot={"policy": "best"})
    steps(source, 1, 2)
    source.validated(2, 0.5)
    assert versions(steps(source, 3, 3)[3]) == {0}
    source.validated(3, 0.4)  # no better
    assert versions(steps(source, 4, 6)[6]) == {2}


def test_cost_counts_what_was_asked_for_and_what_came(tmp_path: Path) -> None:
    source = made(tmp_path)
    source.start_at(2)
    chunk, _ = source.take(3)
    [first, *_] = source.late(chunk, 3)[0].values()
    answer = SimpleNamespace(token_ids=[1], log_probs=[-0.5], extra_fields={"global_steps": 0})
    source.harvest([SampledPrefix.from_answers(first, 0, first.lengths[0], [answer])])
    metrics = source.metrics()
    assert metrics["soup/cost/seed_requests"] == PROMPTS * 3
    assert metrics["soup/cost/seeds_lost"] == PROMPTS * 3 - 1
    assert metrics["soup/cost/seed_tokens"] == 1
    assert metrics["soup/bank/prefixes"] == 0


def test_a_missing_adapter_ends_the_run(tmp_path: Path) -> None:
    source = made(tmp_path)
    engine: Any = source._engine
    engine.why = "the adapter of version 3 cannot be loaded: x is missing"
    with pytest.raises(RunEndedError, match="In step 4 the adapter of version 3 cannot be loaded: x is missing"):
        source.generated(4)


# ---------------------------------------------------------------- resume


def test_a_resumed_run_has_the_adapters_of_its_checkpoint_and_draws_the_same(tmp_path: Path) -> None:
    source, folder = made(tmp_path / "a"), tmp_path / "checkpoint"
    folder.mkdir()
    steps(source, 1, 5)
    source.save(folder)
    expected = steps(source, 6, 8)
    resumed = made(tmp_path / "b")
    resumed.load(folder)
    assert {(tmp_path / "b/kept/version_5" / name).read_text() for name in ADAPTER_FILES} == {"5"}
    found = steps(resumed, 6, 8)
    for step in (6, 7, 8):
        lengths = [[[r.lengths for r in row.values()] for row in rows] for rows in (expected[step], found[step])]
        assert lengths[0] == lengths[1]
        assert versions(found[step]) == versions(expected[step]) == {step - 3}
    # What the checkpoint holds is its own: the run's folder may be swept.
    assert (folder / SNAPSHOT_FOLDER / "version_4" / ADAPTER_FILES[0]).exists()


@pytest.mark.parametrize("name", ADAPTER_FILES)
def test_a_checkpoint_that_lost_an_adapter_is_refused_by_the_files_name(name: str, tmp_path: Path) -> None:
    source, folder = made(tmp_path / "a"), tmp_path / "checkpoint"
    folder.mkdir()
    steps(source, 1, 5)
    source.save(folder)
    check_bank("trainer.resume_from_path", folder, source.facts.origin)
    lost = folder / SNAPSHOT_FOLDER / "version_4" / name
    lost.unlink()
    with pytest.raises(SystemExit, match=f"the adapter of version 4 is lost: .*{lost.name} is missing; resume another"):
        check_bank("trainer.resume_from_path", folder, source.facts.origin)


def test_whole_weights_are_no_adapters(tmp_path: Path) -> None:
    source, folder = made(tmp_path / "a"), tmp_path / "checkpoint"
    folder.mkdir()
    source.save(folder)
    now = {**source.facts.origin, PLACEMENT: "colocated or standalone"}
    with pytest.raises(SystemExit, match=r"snapshot.placement=colocated or standalone: .* were made with shared, and"):
        check_bank("trainer.resume_from_path", folder, now)


def test_versions_that_are_too_old_sample_nothing_and_are_counted(tmp_path: Path) -> None:
    source = made(tmp_path, max_age=3, snapshot={"policy": "pool", "keep": 8})
    ages: list[int] = []
    too_old = 0.0
    for step in range(1, STEPS):
        rows = steps(source, step, step)[step]
        ages += [step - 1 - version for version in versions(rows)]
        too_old += source.metrics()["soup/cost/too_old"]
    assert max(ages) == 3
    assert too_old > 0
