"""A request to a run: end after this step, with a checkpoint. A file, so that it reaches a trainer on another node."""

from pathlib import Path

NAME = "stop_after_this_step"


def request_file(folder: str | Path) -> Path:
    """Return where the request lies, in the folder of the run's checkpoints."""
    return Path(folder) / NAME


def ask_to_stop(folder: str | Path) -> Path:
    """Leave the request; whoever runs the trainer takes it away when the run has ended."""
    file = request_file(folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    return file
