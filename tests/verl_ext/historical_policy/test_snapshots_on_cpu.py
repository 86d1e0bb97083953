"""Snapshots: what is kept, in which form, and what survives a restart. Ray's object store is a dictionary here."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save_file

from verl_ext.historical_policy import snapshots, store
from verl_ext.historical_policy.checkpoint_engine import BACKEND, SnapshotCheckpointEngine
from verl_ext.historical_policy.snapshots import FOREIGN, Snapshot, checkpoint_files, from_checkpoint
from verl_ext.historical_policy.store import SnapshotStore, surplus


class Reference:
    """An object reference; awaiting it gives the object."""

    def __init__(self, value: bytes) -> None:
        self.value = value

    def __await__(self) -> Any:
        yield from ()
        return self.value


@pytest.fixture(autouse=True)
def ray_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(put=Reference, get=lambda reference: reference.value)
    monkeypatch.setattr(snapshots, "ray", fake)
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
    written = run(engine.send_weights((weights or WEIGHTS).items(), global_steps=version))
    return Snapshot(version, written["shards"], written["nbytes"])


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
        assert snapshot.nbytes == sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))


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
    assert load((checkpoint / "version_2" / "00000.safetensors").read_bytes())["w"].tolist() == [2.0] * 3


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
