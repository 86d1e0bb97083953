"""Hydra callbacks: before verl's main function, hence before Ray and any model, and after it."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from recipe.soup.metrics_file import metrics_file
from verl_ext.callbacks import require_supported_verl

FOLDERS = {
    "samples": "trainer.rollout_data_dir",
    "validation samples": "trainer.validation_data_dir",
    "checkpoints": "trainer.default_local_dir",
}
"""What a run leaves behind, and the key of where."""
CLOCK_SECONDS = 1.0
"""File systems' clocks are coarser than the process's."""


def _check(check: Callable[[DictConfig], None], config: DictConfig) -> None:
    try:
        check(config)
    except Exception as error:  # Hydra would only warn of it, and the run would start unchecked
        raise SystemExit(f"The config could not be checked ({error!r}): this is a bug of ours.") from error


class RefuseWrongConfig(Callback):
    """Refuse, in one sentence, a config that SOUP cannot honour."""

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        require_supported_verl()
        from recipe.soup.refusals import check_config
        from recipe.soup.run_settings import what_auto_means

        _check(check_config, config)
        if line := what_auto_means(config):
            print(line, flush=True)


class RefuseWrongBatches(Callback):
    """Refuse, in one sentence, batches that verl's workers would stumble over, or that hold nothing to compare."""

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        from recipe.soup.batch_refusals import check_batches

        _check(check_batches, config)


class RefuseWrongSettings(Callback):
    """Refuse, in one sentence, a value under `algorithm.soup`, where the twin has keys as well."""

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        from recipe.soup.settings import parse_settings

        parse_settings(config.algorithm.get("soup"), config.actor_rollout_ref.rollout.response_length)


def _written_since(path: Path, moment: float) -> bool:
    """Whether a file, or one in the folder, has been written since then: earlier runs may have left others."""
    return path.exists() and any(item.stat().st_mtime >= moment for item in (path, *path.glob("*")))


class ShowResult(Callback):
    """At a run's end: before and after, one picture, and where everything is."""

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        self._began = time.time() - CLOCK_SECONDS

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        path = metrics_file(config)
        # On a cluster the trainer may have written them on another node.
        written = "file" in config.trainer.logger and _written_since(path, self._began)
        if job_return.status is not JobStatus.COMPLETED or not written:
            return
        from recipe.soup.plot import draw_run
        from recipe.soup.summary import summary

        places = {what: OmegaConf.select(config, key) for what, key in FOLDERS.items()}
        places = {what: at for what, at in places.items() if at and _written_since(Path(at), self._began)}
        print(summary(path, places), flush=True)
        print(f"  picture in {draw_run(path)}")
