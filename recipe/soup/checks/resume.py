"""Refuse to go on from a checkpoint whose prefixes cannot be used, before anything starts."""

from pathlib import Path

from omegaconf import DictConfig

from recipe.soup.bank_origin import NOTHING, SOURCE, bank_origin
from recipe.soup.checks.outputs import check_resume
from recipe.soup.errors import refuse
from recipe.soup.names import ASYNC_TRAINER_MODES
from recipe.soup.prefixes.bank import read_origin
from recipe.soup.prefixes.files import UnreadableError
from recipe.soup.prefixes.resume import check_bank
from recipe.soup.prefixes.source import BANK_FILE
from recipe.soup.settings import SoupSettings

IN_FLIGHT = "transfer_queue"
"""Where verl's asynchronous trainers save prompts that are under way, and the samples that wait to be trained on."""


def check_prefixes(config: DictConfig, settings: SoupSettings) -> None:
    """Check the prefixes that a run that mixes is to go on with, if it goes on at all.

    Raises:
        SystemExit: key, value, what is wrong and what to do.
    """
    if (found := _checkpoint(config)) is not None and settings.resume_bank == "strict":
        check_bank(*found, bank_origin(config))


def check_under_way(config: DictConfig, settings: SoupSettings) -> None:
    """Check that a run takes over what was under way, whose prefixes and samples are those of the checkpoint's run.

    Also of a run that mixes nothing: it would train on their prefixes as if it had sampled them.

    Raises:
        SystemExit: key, value, what is wrong and what to do.
    """
    if (found := _checkpoint(config)) is None or not (found[1] / IN_FLIGHT).exists():
        return
    folder, mode = found[1], config.trainer.v1.trainer_mode
    if mode not in ASYNC_TRAINER_MODES:
        why = f"{folder} has prompts that were under way, which only {' and '.join(ASYNC_TRAINER_MODES)} go on with"
        raise refuse("trainer.v1.trainer_mode", mode, f"{why}; choose one of them.")
    if settings.mixes and settings.resume_bank == "fresh":
        why = f"{folder} has prompts and samples that were under way, and they bring prefixes that this would leave out"
        raise refuse("algorithm.soup.resume_bank", "fresh", f"{why}; set it to strict, or start in another folder.")
    try:
        origin = read_origin(folder / BANK_FILE)
    except (OSError, UnreadableError) as error:
        if settings.mixes:
            return  # it is told so by `check_bank`
        why = f"has prompts and samples that were under way, and does not say whether they bring prefixes ({error})"
        cure = "go on with the version that wrote it, or start in another folder"
        raise refuse(found[0], folder, f"{why}; {cure}.") from None
    if not settings.mixes and origin.get(SOURCE) != NOTHING:
        why = f"{folder} has prompts and samples that were under way, with prefixes that only a run that mixes corrects"
        raise refuse("algorithm.soup.mixed_share", 0, f"{why}; go on with algorithm=soup, or start in another folder.")


def _checkpoint(config: DictConfig) -> tuple[str, Path] | None:
    """The key that names the checkpoint to go on with, and its folder; None if the run starts anew."""
    check_resume(config)
    trainer = config.trainer
    if trainer.resume_mode == "resume_path":
        return "trainer.resume_from_path", Path(str(trainer.resume_from_path))
    root = Path(str(trainer.default_local_dir))
    tracker = root / "latest_checkpointed_iteration.txt"
    if trainer.resume_mode == "auto" and tracker.exists():
        return "trainer.default_local_dir", root / f"global_step_{tracker.read_text().strip()}"
    return None
