"""A CheckpointEngine of verl that sends the trainer's weights through Ray's object store, on any device.

verl's own engines between trainers and replicas apart need NCCL, RDMA and the like, so a machine without accelerators
has none. This one is plain: the weights are copied to the host of the first training worker, and each rollout worker
fetches them from there. verl finds it by `rollout.checkpoint_engine.{backend,custom_backend_module}`.
"""

from collections.abc import AsyncGenerator, Iterable
from typing import Any, ClassVar
from uuid import uuid4

import torch
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry
from verl.utils.device import get_device_id

from verl_ext.historical_policy.writing import stage, unpack, write_shards
from verl_ext.mailbox import Mailbox

BACKEND = "ray_store"


@CheckpointEngineRegistry.register(BACKEND)  # pyright: ignore[reportAttributeAccessIssue]  (verl left out @staticmethod)
class RayStoreEngine(CheckpointEngine):
    """One end of a weight sync: in a training worker, or beside a rollout engine.

    Args:
        bucket_size: size of a shard in bytes.
        is_master: whether this training worker sends; the others only take part in gathering the tensors.
    """

    _made: ClassVar[Any] = None

    def __init__(self, bucket_size: int, is_master: bool = False) -> None:
        self._shard_bytes, self._is_master = bucket_size, is_master
        self._mailbox: Any = None
        self._letter = ""

    def prepare(self) -> dict[str, Any]:
        return {}

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[dict]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Name the mailbox and the letter of this sync."""
        # In the driver, and kept there: Ray ends an actor whose maker has forgotten it.
        RayStoreEngine._made = RayStoreEngine._made or Mailbox.remote()
        address: dict[str, Any] = {"mailbox": RayStoreEngine._made, "letter": uuid4().hex}
        return (
            {name: [value] * actor_wg_world_size for name, value in address.items()},
            {name: [value] * rollout_world_size for name, value in address.items()},
        )

    def init_process_group(self, mailbox: Any, letter: str) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._mailbox, self._letter = mailbox, letter

    async def send_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], global_steps: int | None = None
    ) -> dict[str, Any]:
        """Copy the weights into Ray's store. Collective: every training worker must call it."""
        if not self._is_master:
            for _ in weights:
                pass
            return {}
        await self._mailbox.put.remote(self._letter, write_shards(stage(weights, None), self._shard_bytes, None))
        return {}

    async def receive_weights(  # pyright: ignore[reportIncompatibleMethodOverride]  (verl's engines are async generators)
        self, global_steps: int | None = None
    ) -> AsyncGenerator[tuple[str, torch.Tensor], None]:
        device = get_device_id()
        for shard in await self._mailbox.get.remote(self._letter):
            for name, tensor in unpack(await shard).items():
                yield name, tensor.to(device)

    def finalize(self) -> None:
        """Let Ray free the shards, which every rollout worker has read."""
        if self._is_master:
            self._mailbox.drop.remote(self._letter)
