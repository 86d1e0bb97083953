"""A CheckpointEngine of verl that writes the trainer's weights, and streams any weights to a replica.

verl's own engines only send the trainer's current weights to the rollout. This one has two independent ends:
`send_weights` runs in the training workers and makes a snapshot; `receive_weights` runs beside a rollout engine and
reads the snapshot that it was pointed at. verl finds it by `backend` and `custom_backend_module` of
`rollout.checkpoint_engine`; the synchronous trainer still syncs its own rollout in place, whatever this backend is.
"""

from collections.abc import AsyncGenerator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry
from verl.utils.device import get_device_id
from verl.utils.fs import copy_to_local

from verl_ext.historical_policy.snapshots import Shard, Snapshot, checkpoint_files
from verl_ext.historical_policy.writing import stage, unpack, write_shards

BACKEND = "snapshot"


@CheckpointEngineRegistry.register(BACKEND)  # pyright: ignore[reportAttributeAccessIssue]  (verl left out @staticmethod)
class SnapshotCheckpointEngine(CheckpointEngine):
    """Writes and reads weights as safetensors files, or in Ray's object store.

    Args:
        bucket_size: size of a shard in bytes.
        is_master: whether this training worker writes; the others only take part in gathering the tensors.
        folder: folder for the files of snapshots, readable by every node; None keeps them in Ray's object store.
        dtype: torch's name of the rollout engine's data type, in which matrices are written (`narrowed`); None: they
            are written as they are trained.
    """

    def __init__(
        self, bucket_size: int, is_master: bool = False, folder: str | None = None, dtype: str | None = None
    ) -> None:
        self._shard_bytes, self._is_master = bucket_size, is_master
        self._folder = Path(folder) if folder is not None else None
        self._dtype = None if dtype is None else getattr(torch, dtype)
        self._snapshot: Snapshot | None = None
        self._writing: dict[int | None, Future[list[Shard]]] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="snapshot")

    async def send_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], global_steps: int | None = None
    ) -> dict[str, Any]:
        """Copy the weights to the host, and begin to write them. Collective: every training worker must call it.

        Returns:
            `nbytes` of the `Snapshot` on the master, where `written` gives its shards; an empty dictionary elsewhere.

        Raises:
            RuntimeError: an earlier snapshot could not be written.
        """
        if not self._is_master:
            for _ in weights:
                pass
            return {}
        wait(self._writing.values())  # the host holds one copy at a time
        staged = stage(weights, self._dtype)
        for earlier in self._writing.values():  # only now, since the other workers take part in the gathering
            earlier.result()
        nbytes = sum(tensor.nbytes for tensor in staged.values())
        self._writing[global_steps] = self._thread.submit(self._write, staged, global_steps)
        return {"nbytes": nbytes}

    def _write(self, staged: dict[str, torch.Tensor], version: int | None) -> list[Shard]:
        folder = None if self._folder is None else self._folder / f"version_{version}"
        try:
            return write_shards(staged, self._shard_bytes, folder)
        except Exception as error:
            where = folder or "Ray's object store"
            raise RuntimeError(f"the snapshot of version {version} was not written to {where}: {error}") from error

    def written(self, version: int) -> list[Shard] | None:
        """Return the shards of a snapshot that `send_weights` began, once; None while they are being written.

        Does not wait, since the training worker could do nothing else meanwhile.

        Raises:
            RuntimeError: they could not be written.
        """
        if not self._is_master or not self._writing[version].done():
            return None
        return self._writing.pop(version).result()

    def point_at(self, snapshot: Snapshot) -> None:
        """Set the snapshot that `receive_weights` reads next."""
        self._snapshot = snapshot

    async def receive_weights(  # pyright: ignore[reportIncompatibleMethodOverride]  (verl's engines are async generators)
        self, global_steps: int | None = None
    ) -> AsyncGenerator[tuple[str, torch.Tensor], None]:
        assert self._snapshot is not None, "point_at comes first"
        device, origin = get_device_id(), self._snapshot.origin
        for shard in self._snapshot.shards if origin is None else checkpoint_files(copy_to_local(origin)):
            tensors = load_file(shard) if isinstance(shard, Path) else unpack(await shard)
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
        """Forget the snapshot, which may be given up while its weights are still in use."""
        self._snapshot = None
