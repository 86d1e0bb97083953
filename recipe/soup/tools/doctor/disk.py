"""Whether the disk has room for a run's checkpoints, where they are written."""

import math
import shutil
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from recipe.soup.checks.outputs import check_writable, existing
from recipe.soup.checks.snapshot_memory import GB, parameters, trains_adapters
from recipe.soup.errors import refuse
from recipe.soup.tools.doctor.machine import CannotTell


def check_disk(config: DictConfig) -> str:
    """Check that the checkpoints of the whole run fit where they are written.

    Raises:
        SystemExit: they do not.
        CannotTell: the weights are not here, so their size is not known.
    """
    trainer, key = config.trainer, "trainer.default_local_dir"
    if trainer.save_freq <= 0:
        return "no checkpoints are written (trainer.save_freq)"
    folder = Path(trainer.default_local_dir)
    check_writable(key, folder)
    free, size = shutil.disk_usage(existing(folder)).free, checkpoint_bytes(config)
    if size is None:
        raise CannotTell(f"{free / GB:.1f} GB are free in {existing(folder)}; the model's size is not known here")
    kept = _checkpoints(config)
    room = f"a checkpoint takes about {size / GB:.2g} GB, and {free / GB:.1f} GB are free in {existing(folder)}"
    if size > free:
        raise refuse(key, folder, f"{room}; make room, or give a folder on another disk.")
    if kept is not None and kept * size > free:
        why = f"{room}, which is less than the {kept} of this run take"
        raise refuse(key, folder, f"{why}; set trainer.max_actor_ckpt_to_keep, or save less often.")
    return room


def checkpoint_bytes(config: DictConfig) -> float | None:
    """Return the bytes of a checkpoint by its contents; None if the model's weights are not on this machine."""
    count = parameters(str(config.actor_rollout_ref.model.path))
    if count is None:
        return None
    actor = config.actor_rollout_ref.actor
    dtype: Any = (actor.get("fsdp_config") or {}).get("model_dtype")
    width = 4 if str(dtype or "fp32") in ("fp32", "float32") else 2
    moments = 0 if trains_adapters(config) else 2  # Adam's
    copies = {"model": 1, "optimizer": moments, "hf_model": 1}
    return sum(count * width * copies.get(part, 0) for part in actor.checkpoint.save_contents)


def _checkpoints(config: DictConfig) -> int | None:
    """Return how many checkpoints lie there in the end; None if the number of steps is the data's."""
    kept, steps = config.trainer.get("max_actor_ckpt_to_keep"), config.trainer.total_training_steps
    made = None if steps is None else math.ceil(steps / config.trainer.save_freq)
    return kept if made is None or (kept is not None and kept < made) else made
