"""A Hydra callback for SIGTERM, by which a scheduler ends a run: it gets its last words, and if it may, a checkpoint.

Ray's handler of SIGTERM lets the driver exit as by `sys.exit`, but ends it by SIGABRT three seconds later, wherever it
is. Before anything is torn down, Python waits for its threads. So a thread waits here for the main one: it calls Ray's
alarm off, and as long as it lives, the run does.
"""

import signal
import sys
import threading
import time
from typing import Any

import ray
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from verl_ext.health import NOTICE
from verl_ext.stop_request import ask_to_stop, request_file

POLL_SECONDS = 0.2


class FinishAtSigterm(Callback):
    """Asks the trainer to stop, and waits until it has.

    Args:
        folder: of the run's checkpoints.
        seconds: to wait at most; 0: not at all.
    """

    def __init__(self, folder: str, seconds: float) -> None:
        self._folder, self._seconds = folder, float(seconds)
        self._ended = threading.Event()

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if self._seconds > 0:
            request_file(self._folder).unlink(missing_ok=True)
        self._ended.clear()
        threading.Thread(target=self._watch, name="finish-at-sigterm").start()

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            if not threading.main_thread().is_alive():
                signal.alarm(0)
                # Python keeps an interrupt by the user here; and before Ray there is nothing to save.
                if self._seconds > 0 and getattr(sys, "last_value", None) is None and ray.is_initialized():
                    self._finish()
                return

    def _finish(self) -> None:
        file, deadline = ask_to_stop(self._folder), time.monotonic() + self._seconds
        print(f"{NOTICE}SIGTERM: the run ends after this step, within {self._seconds:g} s.", flush=True)
        while file.exists() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        file.unlink(missing_ok=True)
