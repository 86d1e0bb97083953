"""Take snapshots of the trainer's weights, and prepare a run's config for that."""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
from omegaconf import DictConfig, OmegaConf, open_dict

from verl_ext.historical_policy.checkpoint_engine import BACKEND
from verl_ext.historical_policy.snapshots import PendingShards, Shard, Snapshot

POLL_SECONDS = 0.1
"""Seconds between two questions whether a snapshot is written."""


def use_snapshots(config: DictConfig, folder: Path | None) -> None:
    """Enable this run's training workers to write snapshots. Call it before they are created.

    Args:
        config: verl's whole config; changed in place.
        folder: folder for the files, readable by every node; None keeps snapshots in Ray's object store.
    """
    rollout = config.actor_rollout_ref.rollout
    # A quantised engine needs every bit of a weight, and `auto` names no data type.
    quantised = rollout.get("quantization") or OmegaConf.select(rollout, "qat.enable", default=False)
    dtype = None if quantised or rollout.dtype == "auto" else rollout.dtype
    with open_dict(config):
        engine = rollout.checkpoint_engine
        engine.backend = BACKEND
        engine.custom_backend_module = "verl_ext.historical_policy.checkpoint_engine"
        engine.engine_kwargs = {BACKEND: {"folder": None if folder is None else str(folder.absolute()), "dtype": dtype}}


def take_snapshot(actor_rollout_wg: Any, version: int) -> Snapshot:
    """Copy the trainer's weights to the host, where they are written while training goes on.

    Every training worker takes part. Whoever reads the snapshot's `shards` waits until they are written. If that fails,
    the error is raised there, and when the next snapshot is taken.

    Args:
        actor_rollout_wg: verl's worker group of the actor, created after `use_snapshots`.
        version: number of updates that made these weights.
    """
    answers = ray.get(actor_rollout_wg.update_weights(global_steps=version, mode=BACKEND))
    nbytes = next(answer["nbytes"] for answer in answers if answer)
    return Snapshot(version, PendingShards(partial(_wait_for_shards, actor_rollout_wg, version)), nbytes)


def _wait_for_shards(actor_rollout_wg: Any, version: int) -> Sequence[Shard]:
    # Ask again and again, so that a worker that still writes can compute between two questions.
    count = actor_rollout_wg.world_size
    while True:
        answers = ray.get(actor_rollout_wg.execute_checkpoint_engine(["written"] * count, version=[version] * count))
        for answer in answers:
            if answer is not None:
                return answer
        time.sleep(POLL_SECONDS)
