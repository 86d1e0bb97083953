"""A Hydra callback that shows a run's result at its end."""

import time
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from recipe.soup.records.metrics_file import metrics_file, trackers

FOLDERS = {
    "samples": "trainer.rollout_data_dir",
    "validation samples": "trainer.validation_data_dir",
    "checkpoints": "trainer.default_local_dir",
}
"""What a run leaves behind, and the key that says where."""
CLOCK_SECONDS = 1.0
"""Tolerance: a file system's clock is coarser than the process's."""


def _written_since(path: Path, moment: float) -> bool:
    """Whether the file, or a file in the folder, has been written since then; earlier runs may have left others."""
    return path.exists() and any(item.stat().st_mtime >= moment for item in (path, *path.glob("*")))


class ShowResult(Callback):
    """Print before and after, draw one picture, and say where everything is, when a run ends."""

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        self._began = time.time() - CLOCK_SECONDS

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        path = metrics_file(config)
        # On a cluster the trainer may have written them on another node.
        written = "file" in trackers(config) and _written_since(path, self._began)
        if job_return.status is not JobStatus.COMPLETED or not written:
            return
        from recipe.soup.tools.plot import draw_run
        from recipe.soup.tools.summary import summary

        places = {what: OmegaConf.select(config, key) for what, key in FOLDERS.items()}
        places = {what: at for what, at in places.items() if at and _written_since(Path(at), self._began)}
        try:
            print(summary(path, places), flush=True)
            print(f"  picture in {draw_run(path)}")
        except SystemExit as refusal:  # a run that has come to its end has not failed because its log is broken
            print(refusal.code)
