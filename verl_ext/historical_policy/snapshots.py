"""Past weights: what a snapshot is, how it is written, and what else may serve as one. Imports no verl."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import ray
import torch
from huggingface_hub import snapshot_download
from ray import ObjectRef
from safetensors.torch import save

FOREIGN = -1
"""Version of weights that are not of this run."""


@dataclass(frozen=True)
class Snapshot:
    """The weights of one policy, under their Hugging Face names.

    Attributes:
        version: number of updates that made them, or `FOREIGN`.
        shards: safetensors, each a file that all nodes see or an object in Ray's store.
        nbytes: of all shards.
        origin: in place of shards, a checkpoint that each node finds for itself (`from_checkpoint`).
    """

    version: int
    shards: tuple[Path | ObjectRef, ...]
    nbytes: int
    origin: str | None = None


def write_tensors(
    weights: Iterable[tuple[str, torch.Tensor]], shard_bytes: int, folder: Path | None
) -> Iterator[tuple[Path | ObjectRef, int]]:
    """Pack tensors into safetensors shards of about `shard_bytes`; yields each shard and its size in bytes.

    Args:
        folder: where the files go (made if missing), or None for Ray's object store.
    """
    pending: dict[str, torch.Tensor] = {}
    count = size = 0

    def flush() -> tuple[Path | ObjectRef, int]:
        data = save(pending)
        if folder is None:
            return ray.put(data), len(data)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{count:05d}.safetensors"
        path.unlink(missing_ok=True)  # a checkpoint may hold a link to an older file of this name
        path.write_bytes(data)
        return path, len(data)

    for name, tensor in weights:
        # A copy: the tensor may be a live parameter, or share its memory with another one.
        pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += pending[name].nbytes
        if size >= shard_bytes:
            yield flush()
            pending, size, count = {}, 0, count + 1
    if pending:
        yield flush()


def from_checkpoint(path: str, version: int = FOREIGN) -> Snapshot:
    """The weights of a checkpoint; nothing is read yet. See `checkpoint_files` for what it may be."""
    folder = Path(path).expanduser()
    return Snapshot(version, (), 0, origin=str(folder.absolute()) if folder.exists() else path)


def checkpoint_files(path: str) -> list[Path]:
    """The safetensors files of a model folder, of a verl checkpoint that holds one, or of a model on the hub.

    Args:
        path: a folder with safetensors files; a verl checkpoint (`global_step_8`, or `actor` in it) that was saved
            with `hf_model` in `checkpoint.save_contents`; or a model's name on the hub.

    Raises:
        FileNotFoundError: no safetensors there; says how to get them.
    """
    root = Path(path).expanduser()
    if not root.exists():
        root = Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.json"]))
    for folder in (root, root / "huggingface", root / "actor" / "huggingface"):
        files = sorted(folder.glob("*.safetensors"))
        index = folder / "model.safetensors.index.json"
        if index.exists():  # other files lie beside them in some repositories
            files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
        elif (folder / "model.safetensors").exists():
            files = [folder / "model.safetensors"]
        if files:
            return files
    raise FileNotFoundError(
        f"{path} holds no *.safetensors: save checkpoints with `hf_model` in actor_rollout_ref.actor.checkpoint."
        "save_contents, or convert this one with `python -m verl.model_merger merge`."
    )
