"""Snapshots of past weights, and checkpoints that serve as one."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from huggingface_hub import snapshot_download
from ray import ObjectRef

Shard = Path | ObjectRef
"""A safetensors file that all nodes see, or an object in Ray's store, made by `writing.pack`."""

FOREIGN = -1
"""Version of weights that this run did not make."""
TRAINED_ADAPTERS = "lora_train_meta.json"
"""verl writes it into a checkpoint's folder `actor` where adapters are trained."""
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""What PEFT writes of an adapter."""


@dataclass(frozen=True)
class Adapter:
    """LoRA adapters of one version.

    Attributes:
        version: number of updates that made them; `FOREIGN` for those of another run.
        folder: PEFT's, which all nodes must see.
    """

    version: int
    folder: str


def missing_file(folder: Path) -> Path | None:
    """Return the file that a folder lacks to be an adapter of PEFT's, if it does."""
    return next((folder / name for name in ADAPTER_FILES if not (folder / name).is_file()), None)


class PendingShards(Sequence[Shard]):
    """Shards that are still being written; whoever reads them waits until they are there.

    Args:
        wait: waits and returns the shards; called once. What it raises is raised again for each reader.
    """

    def __init__(self, wait: Callable[[], Sequence[Shard]]) -> None:
        self._wait, self._lock = wait, Lock()
        self._shards: tuple[Shard, ...] | None = None
        self._error: Exception | None = None

    def _get(self) -> tuple[Shard, ...]:
        with self._lock:  # a checkpoint and an engine may ask at once
            if self._error is not None:
                raise self._error
            if self._shards is None:
                try:
                    self._shards = tuple(self._wait())
                except Exception as error:
                    self._error = error
                    raise
            return self._shards

    def __getitem__(self, index: Any) -> Any:
        return self._get()[index]

    def __len__(self) -> int:
        return len(self._get())


@dataclass(frozen=True)
class Snapshot:
    """The weights of one policy, under their Hugging Face names.

    Attributes:
        version: number of updates that made the weights, or `FOREIGN`.
        shards: all tensors; `PendingShards` while they are being written.
        nbytes: bytes of all tensors, or of their files if the snapshot was read back from a checkpoint.
        origin: checkpoint that each node finds for itself, in place of shards (`from_checkpoint`).
    """

    version: int
    shards: Sequence[Shard]
    nbytes: int
    origin: str | None = None

    @property
    def adapter(self) -> Adapter:
        """The same as adapters, if it was made of them (`adapters.py`)."""
        if self.origin is not None:
            return Adapter(self.version, self.origin)
        [file, *_] = self.shards
        assert isinstance(file, Path)
        return Adapter(self.version, str(file.parent))


def from_checkpoint(path: str, version: int = FOREIGN) -> Snapshot:
    """Make a snapshot of a checkpoint, without reading it yet. `checkpoint_files` says what it may be."""
    folder = Path(path).expanduser()
    return Snapshot(version, (), 0, origin=str(folder.absolute()) if folder.exists() else path)


def checkpoint_files(path: str) -> list[Path]:
    """Return the safetensors files of a model folder, of a verl checkpoint that has one, or of a model on the hub.

    Args:
        path: a folder with safetensors files; a verl checkpoint (`global_step_8`, or `actor` in it) that was saved
            with `hf_model` in `checkpoint.save_contents`; or a model's name on the hub.

    Raises:
        FileNotFoundError: there are no safetensors, or those of LoRA adapters beside a base model; says what to do.
    """
    root = Path(path).expanduser()
    if any((folder / TRAINED_ADAPTERS).exists() for folder in (root, root.parent, root / "actor")):
        raise FileNotFoundError(
            f"{path} holds LoRA adapters beside a base model, under names of PEFT's, and no whole weights: merge them "
            "first, with PEFT."
        )
    if not root.exists():
        root = Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.json"]))
    for folder in (root, root / "huggingface", root / "actor" / "huggingface"):
        files = sorted(folder.glob("*.safetensors"))
        index = folder / "model.safetensors.index.json"
        if index.exists():  # some repositories have other files beside them
            files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
        elif (folder / "model.safetensors").exists():
            files = [folder / "model.safetensors"]
        if files:
            return files
    raise FileNotFoundError(
        f"{path} holds no *.safetensors: save checkpoints with `hf_model` in actor_rollout_ref.actor.checkpoint."
        "save_contents, or convert this one with `python -m verl.model_merger merge`."
    )
