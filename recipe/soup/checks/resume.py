"""Refuse to go on from a checkpoint whose prefixes cannot be used, before anything starts."""

from pathlib import Path

from omegaconf import DictConfig

from recipe.soup.bank_origin import bank_origin
from recipe.soup.checks.outputs import check_resume
from recipe.soup.errors import refuse
from recipe.soup.names import ASYNC_TRAINER_MODES
from recipe.soup.prefixes.resume import check_bank
from recipe.soup.settings import SoupSettings

IN_FLIGHT = "transfer_queue"
"""Where verl's asynchronous trainers save prompts that are under way, and the samples that wait to be trained on."""


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
    if (folder / IN_FLIGHT).exists():
        _check_in_flight(folder, trainer.v1.trainer_mode, settings)
    if settings.resume_bank == "strict":
        check_bank(key, folder, bank_origin(config))


def _check_in_flight(folder: Path, mode: str, settings: SoupSettings) -> None:
    """Check that a run takes over what was under way, whose prefixes and samples are those of the checkpoint's run."""
    if mode not in ASYNC_TRAINER_MODES:
        why = f"{folder} has prompts that were under way, which only {' and '.join(ASYNC_TRAINER_MODES)} go on with"
        raise refuse("trainer.v1.trainer_mode", mode, f"{why}; choose one of them.")
    if settings.resume_bank == "fresh":
        why = f"{folder} has prompts and samples that were under way, and they bring prefixes that this would leave out"
        raise refuse("algorithm.soup.resume_bank", "fresh", f"{why}; set it to strict, or start in another folder.")
