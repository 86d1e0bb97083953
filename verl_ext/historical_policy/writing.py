"""Write a snapshot: copy it to the host at once, and to its shards in a thread."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import ray
import torch
from safetensors.torch import save_file

from verl_ext.historical_policy.snapshots import Shard

Packed = dict[str, tuple[torch.dtype, torch.Size, np.ndarray]]
"""Tensors as data type, shape and bytes, which Ray's store takes with one copy and returns without any."""


def stage(weights: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Cast weights where they are, and copy them to the host; they may change as soon as this returns.

    An accelerator's tensors go to pinned memory in one pass, without waiting for each other. (torch keeps the pinned
    memory for the next time, in blocks whose sizes are powers of two.)

    Args:
        dtype: see `narrowed`.
    """
    staged: dict[str, torch.Tensor] = {}
    device = torch.device("cpu")
    for name, tensor in weights:
        source, device = narrowed(name, tensor.detach(), dtype), tensor.device
        # Always copied: the tensor may be a live parameter, or share its memory with another one.
        staged[name] = torch.empty(source.shape, dtype=source.dtype, pin_memory=device.type != "cpu")
        staged[name].copy_(source, non_blocking=True)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return staged


def narrowed(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Cast a matrix to the engine's data type, if that is smaller; the engine would round to the same bits itself.

    Vectors and the routers of mixtures of experts stay as they are: vLLM keeps them in fp32 for some models, and they
    take next to no memory.

    Args:
        dtype: data type of the engine, or None to leave everything as it is.
    """
    routes = any(part == "gate" or "router" in part for part in name.split("."))
    if dtype is None or tensor.ndim < 2 or routes or not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype) if tensor.dtype.itemsize > dtype.itemsize else tensor


def write_shards(staged: dict[str, torch.Tensor], shard_bytes: int, folder: Path | None) -> list[Shard]:
    """Write tensors in shards of about `shard_bytes`. It may run in a thread, since copying lets other threads run.

    Args:
        staged: the tensors by name; they are removed one by one, so that their memory is freed.
        folder: folder for safetensors files (made if missing), or None for Ray's object store.
    """
    shards: list[Shard] = []
    for count, tensors in enumerate(_grouped(staged, shard_bytes)):
        if folder is None:
            shards.append(ray.put(pack(tensors)))
            continue
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{count:05d}.safetensors"
        path.unlink(missing_ok=True)  # a checkpoint may hold a link to an older file of this name
        save_file(tensors, path)
        shards.append(path)
    return shards


def _grouped(staged: dict[str, torch.Tensor], shard_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    group: dict[str, torch.Tensor] = {}
    for name in list(staged):
        group[name] = staged.pop(name)
        if sum(tensor.nbytes for tensor in group.values()) >= shard_bytes:
            yield group
            group = {}
    if group:
        yield group


def pack(tensors: Mapping[str, torch.Tensor]) -> Packed:
    """Pack tensors of the host for Ray's object store; shares their memory."""
    return {
        name: (tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).numpy())
        for name, tensor in tensors.items()
    }


def unpack(packed: Packed) -> dict[str, torch.Tensor]:
    """Undo `pack`; shares the memory, which must not be written to if it is in Ray's store."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return {
            name: torch.from_numpy(data).view(dtype).reshape(shape) for name, (dtype, shape, data) in packed.items()
        }
