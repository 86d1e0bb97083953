"""A Hydra callback that ends the terminal of a failed run with the failure's cause, in one line; also of one that was
ended from outside.

Below it would be Hydra's advice on stack traces, above that Ray's and verl's; and where samples or engines failed, the
cause itself stands only in their log.
"""

import atexit
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from ray.exceptions import RayError

from verl_ext.causes import LoggedCause, cause_of
from verl_ext.lost_nodes import Cluster, lost_node, this_cluster

HANDLER = "verl_ext_last_words"
TRACKER = "latest_checkpointed_iteration.txt"
"""verl's note of its last whole checkpoint, in `trainer.default_local_dir`."""


class LastWords(Callback):
    """Prints `The run failed: <cause>`, or by what it was ended, when the process ends, after everything else."""

    def __init__(self) -> None:
        self._logged = LoggedCause()
        self._cluster: Cluster | None = None
        self._checkpoints: Path | None = None

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        # Of a sweep this is not the first job, perhaps, and what the ones before it knew is not its own.
        self._logged, self._cluster = LoggedCause(), None
        folder = OmegaConf.select(config, "trainer.default_local_dir")
        self._checkpoints = Path(folder) if folder else None
        atexit.register(self._ended_from_outside)
        with suppress(ImportError):  # Ray's own; without it the cause is what the exception says
            from ray._private.ray_logging import global_worker_stdstream_dispatcher

            global_worker_stdstream_dispatcher.add_handler(HANDLER, self._take)

    def _take(self, batch: dict[str, Any]) -> None:
        if self._cluster is None:
            with suppress(RayError):
                self._cluster = this_cluster()
        self._logged.take((batch.get("ip"), batch.get("pid")), batch.get("lines", []))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        atexit.unregister(self._ended_from_outside)
        if job_return.status is JobStatus.FAILED and isinstance(job_return._return_value, BaseException):
            atexit.register(self._say, job_return._return_value)

    def _ended_from_outside(self) -> None:
        """No job has ended: it was interrupted, or Ray has turned SIGTERM into an exit."""
        interrupted = isinstance(getattr(sys, "last_value", None), KeyboardInterrupt)
        if not interrupted and self._cluster is None:
            return  # refused at start, whose sentence is the last
        ray.shutdown()
        by = "an interrupt (SIGINT)" if interrupted else "SIGTERM"
        print(f"\nThe run was ended by {by}. {self._where_it_goes_on()}", file=sys.stderr, flush=True)

    def _where_it_goes_on(self) -> str:
        tracker = self._checkpoints / TRACKER if self._checkpoints is not None else None
        step = tracker.read_text().strip() if tracker is not None and tracker.exists() else ""
        if not step:
            return "It had not saved a checkpoint."
        return f"The last checkpoint is {self._checkpoints}/global_step_{step}; trainer.resume_mode=auto goes on there."

    def _say(self, error: BaseException) -> None:
        lost = None
        with suppress(Exception):  # of a Ray that may be gone; the line below must come in any case
            if self._cluster is not None:
                lost = lost_node(cause_of(error, self._logged), self._cluster)
        ray.shutdown()  # which prints what it still has
        cause = cause_of(error, self._logged)
        print(f"\nThe run failed: {f'{lost} ({cause})' if lost else cause}", file=sys.stderr, flush=True)
