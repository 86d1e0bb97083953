"""Runs of one name: what an earlier one left is put aside, and two at a time are refused."""

import fcntl
import os
import time
from collections.abc import Iterable
from itertools import count
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from recipe.soup.errors import refuse

FOLDERS = ("trainer.default_local_dir", "trainer.rollout_data_dir", "trainer.validation_data_dir")
TRACKER = "latest_checkpointed_iteration.txt"
"""verl's note of its last whole checkpoint."""
WRITTEN = ("global_step_*", TRACKER, "past_weights", "past_adapters", "[0-9]*.jsonl")
"""What runs write there; anything else in these folders is somebody else's."""
_HELD: dict[Path, int | None] = {}
"""The places that this process has, with their locks; see `hold`."""
ENDING_SECONDS = 30.0
"""The processes of a run that was killed end by themselves, but not at once."""


def folders(config: DictConfig) -> dict[str, Path]:
    """Return where a run writes, by the keys that say so; folders on this machine only."""
    values = {key: OmegaConf.select(config, key) for key in FOLDERS}
    return {
        key: Path(value) for key, value in values.items() if isinstance(value, str) and value and "://" not in value
    }


def started_anew(config: DictConfig) -> list[Path]:
    """Return the folders in which a run that starts anew puts aside what is there; a mere validation trains nothing."""
    return [place for key, place in folders(config).items() if key != FOLDERS[0] or not config.trainer.val_only]


def put_aside(places: Iterable[Path]) -> str | None:
    """Move what an earlier run has left in these folders to `earlier_<number>` in each of them.

    Returns:
        a sentence for the user, if there was something.
    """
    moved = []
    for folder in dict.fromkeys(places):
        if left := sorted({path for pattern in WRITTEN for path in folder.glob(pattern)}):
            aside = next(new for n in count(1) if not (new := folder / f"earlier_{n}").exists())
            aside.mkdir()
            for path in left:
                path.rename(aside / path.name)
            moved.append(str(aside))
    if not moved:
        return None
    return f"this run starts anew, and what an earlier one of this name left is now in {', '.join(moved)}."


def hold(folder: Path) -> int | None:
    """Keep other runs out of a folder for as long as this process lives.

    Returns:
        the lock; None on a file system without locks, or where there is no such folder yet.

    Raises:
        BlockingIOError: another process has it.
    """
    lock = None
    try:
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if lock is not None:
            os.close(lock)
        raise
    except OSError:
        return None
    return lock


def hold_all(config: DictConfig) -> None:
    """Make the folders that a run writes to, and keep other runs out of them for as long as this process lives.

    Raises:
        SystemExit: another run writes there; which key, which folder, what to do.
    """
    for key, folder in folders(config).items():
        folder.mkdir(parents=True, exist_ok=True)
        if (place := folder.resolve()) not in _HELD:  # two keys may lead to one place
            try:
                _HELD[place] = hold(place)
            except BlockingIOError:
                raise _occupied(key, folder) from None


def _occupied(key: str, folder: Path) -> SystemExit:
    why = "another run writes there at this moment"
    return refuse(key, folder, f"{why}; give this one a trainer.experiment_name of its own.")


def check_free(config: DictConfig, seconds: float = ENDING_SECONDS) -> None:
    """Check that no other run writes where this one will; one that is about to end is waited for.

    Raises:
        SystemExit: which key, which folder, what to do.
    """
    deadline = time.monotonic() + seconds
    for key, folder in folders(config).items():
        while True:
            try:
                lock = hold(folder)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise _occupied(key, folder) from None
                time.sleep(0.5)
                continue
            if lock is not None:
                os.close(lock)
            break
