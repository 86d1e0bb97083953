"""Refuse to go on from a checkpoint whose prefixes cannot be used, before anything starts."""

from pathlib import Path

from omegaconf import DictConfig

from recipe.soup.bank_origin import bank_origin
from recipe.soup.checks.outputs import check_resume
from recipe.soup.errors import refuse
from recipe.soup.names import ASYNC_TRAINER_MODE
from recipe.soup.prefixes.resume import check_bank
from recipe.soup.settings import SoupSettings


def check_prefixes(config: DictConfig, settings: SoupSettings) -> None:
    """Check what a run that mixes is to go on with, if it goes on at all.

    Raises:
        SystemExit: key, value, what is wrong and what to do.
    """
    check_resume(config)
    trainer = config.trainer
    if trainer.resume_mode == "resume_path":
        key, folder = "trainer.resume_from_path", Path(str(trainer.resume_from_path))
    elif trainer.resume_mode == "auto":
        key, root = "trainer.default_local_dir", Path(trainer.default_local_dir)
        tracker = root / "latest_checkpointed_iteration.txt"
        if not tracker.exists():
            return
        folder = root / f"global_step_{tracker.read_text().strip()}"
    else:
        return
    if trainer.v1.trainer_mode == ASYNC_TRAINER_MODE:
        lost = f"{folder} has a checkpoint, but with this trainer the prefixes of samples in flight are not in it"
        advice = "start anew with trainer.resume_mode=disable in a folder of its own; resume_bank=fresh does not help."
        raise refuse("trainer.v1.trainer_mode", ASYNC_TRAINER_MODE, f"{lost}; {advice}")
    if settings.resume_bank == "strict":
        check_bank(key, folder, bank_origin(config))
