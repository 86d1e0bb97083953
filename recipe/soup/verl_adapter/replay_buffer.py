"""Listen to verl's replay buffer, which drops samples that others still want something of."""

from collections.abc import Callable
from typing import Any

from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

Dropped = Callable[[set[str], KVBatchMeta], None]
"""Hears the uids of training groups and their samples, which may be none."""


def listen(buffer: ReplayBuffer, dropped: Dropped, validates: Callable[[KVBatchMeta], None]) -> None:
    """Have a replay buffer tell what it does, whichever of verl's classes, or the user's own, it is.

    Args:
        buffer: its methods are wrapped in place; verl has no seam for it but the user's own class.
        dropped: called before groups of the training partition are cleared: filtered out, stale or too many.
        validates: called with each validation batch; verl drops it as soon as it has its texts and scores.
    """
    clear_groups, sample = buffer._clear_groups, buffer.sample

    def tell_and_clear(partition_id: str, uids: set[str]) -> None:
        if partition_id == "train":
            tags = buffer.partitions[partition_id]
            keys = [key for key in tags if key.split("_")[0] in uids]
            dropped(uids, KVBatchMeta(partition_id=partition_id, keys=keys, tags=[tags[key] for key in keys]))
        clear_groups(partition_id, uids)

    def sample_and_tell(*args: Any, partition_id: str, **kwargs: Any) -> Any:
        batch, metrics = sample(*args, partition_id=partition_id, **kwargs)
        if partition_id == "val":
            validates(batch)
        return batch, metrics

    buffer._clear_groups, buffer.sample = tell_and_clear, sample_and_tell
