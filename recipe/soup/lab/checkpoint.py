"""Checkpoints of the lab, in verl's layout: a run that was killed goes on with the numbers that it would have had.

`global_step_N/actor/huggingface` holds the weights, which `soup eval` and `source=snapshot` take as well.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from recipe.soup.errors import refuse
from recipe.soup.prefixes.source import PrefixSource

TRACKER = "latest_checkpointed_iteration.txt"
STATE_FILE = "lab.pt"


def checkpoint_to_resume(config: DictConfig) -> Path | None:
    """The folder that `trainer.resume_mode` points to, or None: start anew.

    Raises:
        SystemExit: a checkpoint that the lab did not write.
    """
    trainer = config.trainer
    if trainer.resume_mode == "disable":
        return None
    if trainer.resume_mode == "resume_path":
        key, folder = "trainer.resume_from_path", Path(str(trainer.resume_from_path))
    else:
        key, tracker = "trainer.default_local_dir", Path(trainer.default_local_dir) / TRACKER
        if not tracker.exists():
            return None
        folder = tracker.with_name(f"global_step_{tracker.read_text().strip()}")
    if not (folder / STATE_FILE).exists():
        why = f"has no {STATE_FILE}, so the lab did not write it; set trainer.resume_mode=disable to start anew."
        raise refuse(key, folder, why)
    return folder


def step_of(folder: Path) -> int:
    """Updates that made a checkpoint's weights."""
    return int(folder.name.removeprefix("global_step_"))


def weights_of(folder: Path) -> Path:
    """Where a checkpoint's weights and tokenizer are."""
    return folder / "actor" / "huggingface"


def save_checkpoint(
    config: DictConfig, step: int, model: Any, tokenizer: Any, source: PrefixSource, state: dict[str, Any]
) -> None:
    """Write everything that a run needs to go on after `step`; what a killed run has half written is never taken.

    Args:
        state: tensors and numbers beside the weights.
    """
    root = Path(config.trainer.default_local_dir)
    folder, part = root / f"global_step_{step}", root / f"global_step_{step}.part"
    for leftover in (folder, part):
        shutil.rmtree(leftover, ignore_errors=True)
    weights_of(part).mkdir(parents=True)
    model.save_pretrained(weights_of(part))
    tokenizer.save_pretrained(weights_of(part))
    torch.save(state, part / STATE_FILE)
    source.save(part)
    part.rename(folder)
    new = root / f"{TRACKER}.part"
    new.write_text(str(step))
    new.rename(root / TRACKER)
    kept = config.trainer.max_actor_ckpt_to_keep
    if kept is not None:
        whole = [path for path in root.glob("global_step_*") if path.suffix != ".part"]
        # Later ones are those of a run that was there before, and not this one's to delete.
        for old in sorted((path for path in whole if step_of(path) <= step), key=step_of)[:-kept]:
            shutil.rmtree(old)


def read_state(folder: Path) -> dict[str, Any]:
    """What `save_checkpoint` got as `state`."""
    # Tensors and numbers only: a checkpoint from elsewhere runs no code.
    return torch.load(folder / STATE_FILE, weights_only=True, map_location="cpu")
