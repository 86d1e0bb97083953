"""Choose which snapshots are kept, and write them into checkpoints."""

import json
import shutil
from pathlib import Path

import ray
from safetensors.torch import load_file, save_file

from verl_ext.historical_policy.snapshots import Shard, Snapshot
from verl_ext.historical_policy.writing import pack, unpack

INDEX_FILE = "snapshots.json"


def surplus(versions: list[int], keep: int, eviction: str) -> int | None:
    """Return the version to give up so that at most `keep` remain, or None if there are no more.

    Args:
        versions: versions in ascending order.
        eviction: `oldest`; or `log_spaced`, which gives up the version whose neighbours are closest in the logarithm of
            the age, so that ages become about evenly spaced on a log scale. The newest and the oldest stay.
    """
    if len(versions) <= keep:
        return None
    if eviction == "oldest" or keep < 3:
        return versions[0]
    newest = versions[-1]
    ages = [newest - version + 1 for version in versions]
    gaps = [ages[i - 1] / ages[i + 1] for i in range(1, len(versions) - 1)]
    return versions[1 + gaps.index(min(gaps))]


class SnapshotStore:
    """Keeps the snapshots of a run: at most `keep` by their age, and all that have a name.

    Args:
        keep: how many to keep by age, at least 1.
        eviction: see `surplus`.
        folder: folder of the files; nothing outside it is ever deleted. None: snapshots are in Ray's object store.

    Attributes:
        named: snapshots by name.
        notes: numbers to remember with the snapshots, e.g. a score.
    """

    def __init__(self, keep: int, eviction: str = "oldest", folder: Path | None = None) -> None:
        self._keep, self._eviction, self._folder = keep, eviction, folder
        self._by_version: dict[int, Snapshot] = {}
        self.named: dict[str, Snapshot] = {}
        self.notes: dict[str, float] = {}
        self._held: Snapshot | None = None
        for leftover in folder.glob("version_*/*") if folder is not None else ():
            leftover.unlink()  # left by a run that was killed; checkpoints have links or copies of their own

    @property
    def versions(self) -> list[int]:
        """Versions kept by age, in ascending order."""
        return sorted(self._by_version)

    def add(self, snapshot: Snapshot) -> None:
        """Keep a snapshot by its age, and give up another one if there are too many."""
        self._by_version[snapshot.version] = snapshot
        while (version := surplus(self.versions, self._keep, self._eviction)) is not None:
            self._discard(self._by_version.pop(version))

    def name(self, name: str, snapshot: Snapshot) -> None:
        """Keep a snapshot under a name, in place of the one that had the name."""
        former = self.named.get(name)
        self.named[name] = snapshot
        if former is not None:
            self._discard(former)

    def hold(self, snapshot: Snapshot) -> None:
        """Keep the files of a snapshot that is in use until another one is held, even if it is given up meanwhile."""
        former, self._held = self._held, snapshot
        if former is not None:
            self._discard(former)

    def __getitem__(self, version: int) -> Snapshot:
        return self._by_version[version]

    def youngest(self, at_most: int) -> Snapshot | None:
        """Return the youngest snapshot kept by age whose version is at most `at_most`, or None."""
        older = [version for version in self.versions if version <= at_most]
        return self._by_version[older[-1]] if older else None

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is kept; a snapshot that is kept twice counts once."""
        return sum(snapshot.nbytes for snapshot in set(self._all()))

    def _all(self) -> list[Snapshot]:
        return [*self._by_version.values(), *self.named.values()]

    def _discard(self, snapshot: Snapshot) -> None:
        """Delete the files of a snapshot that nothing refers to; Ray frees its objects by itself.

        Waits until the snapshot is written, since its writer would make the files anew, or keep the objects.
        """
        if snapshot in (*self._all(), self._held):
            return
        for shard in snapshot.shards:
            if isinstance(shard, Path) and self._folder is not None and shard.is_relative_to(self._folder):
                shard.unlink(missing_ok=True)

    def save(self, folder: Path) -> None:
        """Write everything into a checkpoint's folder; files on the same file system are linked, not copied.

        The folder belongs to this method: its content is replaced.
        """
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        named = {name: snapshot.version for name, snapshot in self.named.items()}
        index = {"versions": self.versions, "named": named, "notes": self.notes}
        for snapshot in set(self._all()):
            target = folder / f"version_{snapshot.version}"
            target.mkdir()
            for i, shard in enumerate(snapshot.shards):
                name = shard.name if isinstance(shard, Path) else f"{i:05d}.safetensors"
                _link_or_write(shard, target / name)
        (folder / INDEX_FILE).write_text(json.dumps(index))

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, and leave the checkpoint's own files as they are."""
        index = json.loads((folder / INDEX_FILE).read_text())
        snapshots: dict[int, Snapshot] = {}
        for version in {*index["versions"], *index["named"].values()}:
            files = sorted((folder / f"version_{version}").iterdir())
            shards = tuple(self._own(file, version) for file in files)
            snapshots[version] = Snapshot(version, shards, sum(file.stat().st_size for file in files))
        self._by_version = {version: snapshots[version] for version in index["versions"]}
        self.named = {name: snapshots[version] for name, version in index["named"].items()}
        self.notes = index["notes"]

    def _own(self, file: Path, version: int) -> Shard:
        if self._folder is None:
            return ray.put(pack(load_file(file)))
        target = self._folder / f"version_{version}" / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        _link_or_write(file, target)
        return target


def _link_or_write(shard: Shard, target: Path) -> None:
    target.unlink(missing_ok=True)
    if isinstance(shard, Path):
        try:
            target.hardlink_to(shard)
            return
        except OSError:  # another file system
            target.write_bytes(shard.read_bytes())
    else:
        save_file(unpack(ray.get(shard)), target)
