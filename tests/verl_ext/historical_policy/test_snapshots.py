"""Snapshots: what is kept, in which form, and what survives a restart. Ray's object store is a dictionary here."""

import itertools
import json
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from verl_ext.historical_policy import checkpoint_engine, store, writing
from verl_ext.historical_policy.checkpoint_engine import BACKEND, SnapshotCheckpointEngine
from verl_ext.historical_policy.snapshots import FOREIGN, PendingShards, Snapshot, checkpoint_files, from_checkpoint
from verl_ext.historical_policy.store import SnapshotStore, surplus
from verl_ext.historical_policy.writing import Packed, unpack


class Reference:
    """An object reference; awaiting it gives the object."""

    def __init__(self, value: Packed) -> None:
        self.value = value

    def __await__(self) -> Any:
        yield from ()
        return self.value


@pytest.fixture(autouse=True)
def ray_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(put=Reference, get=lambda reference: reference.value)
    monkeypatch.setattr(writing, "ray", fake)
    monkeypatch.setattr(store, "ray", fake)


def run(coroutine: Any) -> Any:
    """Drive a coroutine that never really waits."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it waited")


WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.tensor([7])}


def write(folder: Path | None, version: int = 3, weights: Any = None, bucket: int = 20) -> Snapshot:
    engine = SnapshotCheckpointEngine(bucket, is_master=True, folder=None if folder is None else str(folder))
    sent = run(engine.send_weights((weights or WEIGHTS).items(), global_steps=version))
    return Snapshot(version, tuple(wait_until_written(engine, version)), sent["nbytes"])


def wait_until_written(engine: SnapshotCheckpointEngine, version: int) -> list[Any]:
    shards = None
    while shards is None:
        shards = engine.written(version)
    return shards


def read(snapshot: Snapshot) -> dict[str, torch.Tensor]:
    engine = SnapshotCheckpointEngine(0)
    engine.point_at(snapshot)

    async def collect() -> dict[str, torch.Tensor]:
        return {name: tensor async for name, tensor in engine.receive_weights(snapshot.version)}

    return run(collect())


@pytest.mark.parametrize("on_disk", [True, False])
def test_what_the_trainer_sends_arrives_bit_for_bit(on_disk: bool, tmp_path: Path) -> None:
    snapshot = write(tmp_path if on_disk else None)
    assert len(snapshot.shards) == 2  # 24 bytes, then the other two
    received = read(snapshot)
    assert received.keys() == WEIGHTS.keys()
    for name, tensor in WEIGHTS.items():
        assert received[name].dtype == tensor.dtype
        assert torch.equal(received[name], tensor)
    if on_disk:
        files = [load_file(shard) for shard in snapshot.shards if isinstance(shard, Path)]
        assert {name for tensors in files for name in tensors} == WEIGHTS.keys()
    assert snapshot.nbytes == sum(tensor.nbytes for tensor in WEIGHTS.values())


def test_a_snapshot_does_not_follow_the_weights() -> None:
    live = torch.zeros(3)
    snapshot = write(None, weights={"tied": live, "also": live.view(3)})
    live += 1
    assert all(not tensor.any() for tensor in read(snapshot).values())


def test_other_training_workers_take_part_and_write_nothing() -> None:
    drawn = []
    engine = SnapshotCheckpointEngine(1)
    assert run(engine.send_weights((drawn.append(name) or (name, torch.ones(1)) for name in "ab"), 1)) == {}
    assert drawn == ["a", "b"]
    assert engine.written(1) is None


class TestWritingInTheBackground:
    """`send_weights` returns while the shards are written by a thread, which is held up here."""

    @pytest.fixture
    def held(self, monkeypatch: pytest.MonkeyPatch) -> Event:
        """Set it to let the writing go on."""
        let_go, write_shards = Event(), checkpoint_engine.write_shards

        def slow(*args: Any) -> Any:
            assert let_go.wait(10)
            return write_shards(*args)

        monkeypatch.setattr(checkpoint_engine, "write_shards", slow)
        return let_go

    def test_the_trainer_goes_on_and_its_weights_may_change(self, held: Event) -> None:
        live = torch.zeros(3)
        engine = SnapshotCheckpointEngine(20, is_master=True)
        assert run(engine.send_weights([("w", live)], 4)) == {"nbytes": 12}
        live += 1
        assert engine.written(4) is None
        held.set()
        (shard,) = wait_until_written(engine, 4)
        assert not unpack(shard.value)["w"].any()
        assert engine._writing == {}  # or the objects would live as long as the run

    def test_the_next_one_waits_so_that_the_host_holds_one_copy(self, held: Event) -> None:
        engine = SnapshotCheckpointEngine(20, is_master=True)
        run(engine.send_weights([("w", torch.zeros(3))], 4))
        drawn: list[str] = []
        weights = ((drawn.append(name) or name, torch.ones(3)) for name in ["w"])
        second = Thread(target=lambda: run(engine.send_weights(weights, 5)))
        second.start()
        second.join(0.1)
        assert drawn == []
        held.set()
        second.join(10)
        assert [unpack(wait_until_written(engine, version)[0].value)["w"][0] for version in (4, 5)] == [0, 1]

    def test_a_failure_is_told_to_whoever_needs_the_shards_and_to_the_next_snapshot(self, tmp_path: Path) -> None:
        (tmp_path / "version_4").write_text("in the way")
        engine = SnapshotCheckpointEngine(20, is_master=True, folder=str(tmp_path))
        drawn: list[str] = []
        run(engine.send_weights(WEIGHTS.items(), 4))
        with pytest.raises(RuntimeError, match=r"version 4 was not written to .*version_4"):
            # After the gathering: the other training workers are in it as well.
            run(engine.send_weights(((drawn.append(name) or name, tensor) for name, tensor in WEIGHTS.items()), 5))
        assert drawn == list(WEIGHTS)
        with pytest.raises(RuntimeError, match="version 4 was not written"):
            wait_until_written(engine, 4)

    def test_what_is_given_up_is_written_first_or_its_files_would_come_back(self, tmp_path: Path) -> None:
        store, paths = SnapshotStore(1, folder=tmp_path), [tmp_path / "1.safetensors"]
        asked: list[int] = []

        def finish() -> list[Path]:
            asked.append(1)
            paths[0].touch()
            return paths

        store.add(Snapshot(1, PendingShards(finish), 1))
        assert asked == []
        store.add(write(tmp_path, 2))
        assert asked == [1]
        assert not paths[0].exists()

    @pytest.mark.parametrize("fails", [True, False])
    def test_everyone_who_looks_at_shards_gets_the_same_answer_of_one_question(self, fails: bool) -> None:
        asked: list[int] = []

        def wait() -> list[Path]:
            asked.append(1)
            if fails:
                raise RuntimeError("no room")
            return [Path("a"), Path("b")]

        shards, seen = PendingShards(wait), []

        def look() -> None:
            try:
                seen.append(list(shards))
            except RuntimeError as error:
                seen.append(str(error))

        threads = [Thread(target=look) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == [("no room" if fails else [Path("a"), Path("b")])] * 4
        assert asked == [1]


def test_verl_finds_the_engine_by_its_name() -> None:
    from verl.checkpoint_engine.base import CheckpointEngineRegistry

    engine: Any = CheckpointEngineRegistry.new(BACKEND, is_master=True, bucket_size=1, folder=None)
    assert isinstance(engine, SnapshotCheckpointEngine)


class TestWhatIsKept:
    @given(keep=st.integers(1, 6), eviction=st.sampled_from(["oldest", "log_spaced"]), every=st.integers(1, 5))
    def test_never_more_than_so_many_and_always_the_newest(self, keep: int, eviction: str, every: int) -> None:
        store = SnapshotStore(keep, eviction)
        for version in range(every, 60, every):
            store.add(Snapshot(version, (), 1))
            assert len(store.versions) <= keep
            assert store.versions[-1] == version

    def test_oldest(self) -> None:
        store = SnapshotStore(3)
        for version in range(2, 12, 2):
            store.add(Snapshot(version, (), 10))
        assert store.versions == [6, 8, 10]
        assert store.nbytes == 30

    def test_log_spaced_keeps_old_ones_ever_further_apart(self) -> None:
        store = SnapshotStore(6, "log_spaced")
        for version in range(1, 129):
            store.add(Snapshot(version, (), 1))
        assert store.versions[0] == 1
        distances = [later - earlier for earlier, later in itertools.pairwise(store.versions)]
        assert distances == sorted(distances, reverse=True)
        assert distances[0] > 20

    def test_what_fits_stays(self) -> None:
        assert surplus([1, 2, 3], 3, "oldest") is None

    def test_youngest_that_is_old_enough(self) -> None:
        store = SnapshotStore(3)
        for version in (4, 8, 12):
            store.add(Snapshot(version, (), 1))
        wanted = {3: None, 4: 4, 7: 4, 8: 8, 100: 12}
        for at_most, version in wanted.items():
            found = store.youngest(at_most)
            assert (found and found.version) == version

    def test_files_go_with_their_snapshot_unless_it_has_a_name(self, tmp_path: Path) -> None:
        store = SnapshotStore(1, folder=tmp_path)
        best = write(tmp_path, version=1)
        store.name("best", best)
        for version in (2, 3):
            store.add(write(tmp_path, version))
        assert {path.parent.name for path in tmp_path.rglob("*.safetensors")} == {"version_1", "version_3"}
        store.name("best", write(tmp_path, version=4))
        assert {path.parent.name for path in tmp_path.rglob("*.safetensors")} == {"version_3", "version_4"}

    def test_nobody_elses_files_are_deleted(self, tmp_path: Path) -> None:
        (tmp_path / "model").mkdir()
        save_file(WEIGHTS, tmp_path / "model" / "model.safetensors")
        store = SnapshotStore(1, folder=tmp_path / "own")
        store.name("best", from_checkpoint(str(tmp_path / "model"), version=0))
        store.name("best", write(tmp_path / "own", version=4))
        assert (tmp_path / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_checkpoint_outlives_its_run(on_disk: bool, tmp_path: Path) -> None:
    own, checkpoint = (tmp_path / "own") if on_disk else None, tmp_path / "checkpoint"
    store = SnapshotStore(2, folder=own)
    for version in (2, 4):
        store.add(write(own, version, {"w": torch.full((3,), float(version))}))
    store.name("best", store[2])
    store.notes["best"] = 0.25
    store.save(checkpoint)
    # The run goes on, and gives version 2 up as the older one, then as the best.
    store.add(write(own, 6))
    store.name("best", store[6])

    resumed = SnapshotStore(2, folder=own)
    resumed.load(checkpoint)
    assert resumed.versions == [2, 4]
    assert (resumed.named["best"].version, resumed.notes) == (2, {"best": 0.25})
    assert read(resumed[2])["w"].tolist() == [2.0] * 3
    assert resumed.nbytes == sum(path.stat().st_size for path in checkpoint.rglob("*.safetensors"))
    if own is not None:
        assert {path.parent.name for path in own.rglob("*.safetensors")} == {"version_2", "version_4"}
        write(own, 2)  # what the resumed run writes must not reach into the checkpoint
    assert load_file(checkpoint / "version_2" / "00000.safetensors")["w"].tolist() == [2.0] * 3


def test_a_checkpoint_that_is_written_again_holds_nothing_of_the_former_one(tmp_path: Path) -> None:
    for weights, bucket in (({name: torch.ones(2) for name in "abcd"}, 1), ({"a": torch.zeros(2)}, 100)):
        store = SnapshotStore(2)
        store.add(write(None, 4, weights, bucket))
        store.save(tmp_path / "checkpoint")
    resumed = SnapshotStore(2)
    resumed.load(tmp_path / "checkpoint")
    assert {name: tensor.tolist() for name, tensor in read(resumed[4]).items()} == {"a": [0.0, 0.0]}


def test_files_in_use_stay_until_others_are(tmp_path: Path) -> None:
    store = SnapshotStore(1, folder=tmp_path)
    store.add(write(tmp_path, 1))
    store.hold(store[1])
    store.add(write(tmp_path, 2))
    assert {path.parent.name for path in tmp_path.rglob("*.safetensors")} == {"version_1", "version_2"}
    store.hold(store[2])
    assert {path.parent.name for path in tmp_path.rglob("*.safetensors")} == {"version_2"}


class TestCheckpoints:
    @pytest.mark.parametrize("inside", [".", "huggingface", "actor/huggingface"])
    def test_a_model_folder_or_a_verl_checkpoint(self, inside: str, tmp_path: Path) -> None:
        folder = tmp_path / inside
        folder.mkdir(parents=True, exist_ok=True)
        save_file(WEIGHTS, folder / "model.safetensors")
        snapshot = from_checkpoint(str(tmp_path))
        assert snapshot.version == FOREIGN
        assert read(snapshot).keys() == WEIGHTS.keys()

    def test_without_safetensors_it_says_what_to_do(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="hf_model"):
            checkpoint_files(str(tmp_path))

    def test_what_the_index_does_not_name_is_not_the_model(self, tmp_path: Path) -> None:
        names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        for name in [*names, "consolidated.safetensors"]:
            save_file({name: torch.zeros(1)}, tmp_path / name)
        index = {"weight_map": {"a": names[0], "b": names[1], "c": names[1]}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        assert [path.name for path in checkpoint_files(str(tmp_path))] == names
        (tmp_path / "model.safetensors.index.json").unlink()
        save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
        assert [path.name for path in checkpoint_files(str(tmp_path))] == ["model.safetensors"]
