"""A verl CheckpointEngine that writes the trainer's weights as safetensors, and streams any such weights to a replica.

verl's own engines only connect the trainer's current weights with the rollout. This one has two independent ends:
`send_weights` runs in the training workers and makes a snapshot; `receive_weights` runs beside a rollout engine and
reads the snapshot that it was pointed at. verl finds it by `backend` and `custom_backend_module` of
`rollout.checkpoint_engine`; the synchronous trainer keeps syncing its own rollout in place, whatever this backend is.
"""

from collections.abc import AsyncGenerator, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, load_file
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry
from verl.utils.device import get_device_id
from verl.utils.fs import copy_to_local

from verl_ext.historical_policy.snapshots import Snapshot, checkpoint_files, write_tensors

BACKEND = "snapshot"


@CheckpointEngineRegistry.register(BACKEND)  # pyright: ignore[reportAttributeAccessIssue]  (verl left out @staticmethod)
class SnapshotCheckpointEngine(CheckpointEngine):
    """Weights as safetensors shards, in files or in Ray's object store.

    Args:
        bucket_size: bytes of a shard.
        is_master: this training worker writes; the others only take part in the gathering of the tensors.
        folder: for the files of snapshots, readable by every node; None keeps them in Ray's object store.
    """

    def __init__(self, bucket_size: int, is_master: bool = False, folder: str | None = None) -> None:
        self._shard_bytes, self._is_master = bucket_size, is_master
        self._folder = Path(folder) if folder is not None else None
        self._snapshot: Snapshot | None = None

    async def send_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], global_steps: int | None = None
    ) -> dict[str, Any]:
        """Write the weights. Collective: every training worker must call it.

        Returns:
            on the master, `shards` and `nbytes` of the `Snapshot`; elsewhere nothing.
        """
        if not self._is_master:
            for _ in weights:
                pass
            return {}
        folder = None if self._folder is None else self._folder / f"version_{global_steps}"
        written = list(write_tensors(weights, self._shard_bytes, folder))
        return {"shards": tuple(shard for shard, _ in written), "nbytes": sum(size for _, size in written)}

    def point_at(self, snapshot: Snapshot) -> None:
        """What `receive_weights` is to read next."""
        self._snapshot = snapshot

    async def receive_weights(  # pyright: ignore[reportIncompatibleMethodOverride]  (verl's engines are async generators)
        self, global_steps: int | None = None
    ) -> AsyncGenerator[tuple[str, torch.Tensor], None]:
        assert self._snapshot is not None, "point_at comes first"
        device, origin = get_device_id(), self._snapshot.origin
        for shard in self._snapshot.shards if origin is None else checkpoint_files(copy_to_local(origin)):
            tensors = load_file(shard) if isinstance(shard, Path) else load(await shard)
            for name, tensor in tensors.items():
                yield name, tensor.to(device)

    # The two ends never talk to each other, so there is no group to build.

    def prepare(self) -> dict[str, Any]:
        return {}

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[dict]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        return {}, {}

    def init_process_group(self, **kwargs: Any) -> None:
        return None

    def finalize(self) -> None:
        """Let go of the snapshot, which may be given up while its weights are still in use."""
        self._snapshot = None
