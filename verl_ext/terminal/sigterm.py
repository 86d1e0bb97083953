"""A Hydra callback for SIGTERM, by which a scheduler ends a run: it gets its last words, and if it may, a checkpoint.

Ray's handler of SIGTERM lets the driver exit as by `sys.exit`, but ends it by SIGABRT three seconds later, wherever it
is. Before anything is torn down, Python waits for its threads. So a thread waits here for the main one: it calls Ray's
alarm off, and as long as it lives, the run does.
"""

import os
import signal
import socket
import sys
import threading
import time
from typing import Any

import ray
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from verl_ext.health import ENDED, NOTICE
from verl_ext.stop_request import ask_to_stop, request_file
from verl_ext.terminal.this_job import arguments

POLL_SECONDS = 0.2
SETTLE_SECONDS = 2.0


class FinishAtSigterm(Callback):
    """Asks the trainer to stop, and waits until it has.

    Args:
        folder: of the run's checkpoints.
        seconds: to wait at most, a number; 0: not at all.
    """

    def __init__(self, folder: str, seconds: Any) -> None:
        self._set(folder, seconds)
        self._ended = threading.Event()

    def _set(self, folder: str, seconds: Any) -> None:
        # What is no number is refused by the checks, which come after this.
        self._folder, self._seconds = folder, float(seconds) if isinstance(seconds, int | float) else 0.0

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if (given := arguments(self, config)) is not None:
            self._set(**given)
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
                if getattr(sys, "last_value", None) is None and ray.is_initialized():
                    self._finish(ray.get_runtime_context().gcs_address)
                return

    def _finish(self, head: str) -> None:
        """Wait for the trainer, and for long enough to see whether Ray has got the signal as well."""
        file, deadline = None, time.monotonic() + max(self._seconds, SETTLE_SECONDS)
        if self._seconds > 0:
            file = ask_to_stop(self._folder)
            print(f"{NOTICE}SIGTERM: the run ends after this step, within {self._seconds:g} s.", flush=True)
        while (file is None or file.exists()) and time.monotonic() < deadline:
            if not _answers(head):
                print(f"SIGTERM came to Ray as well, so that nothing could be saved any more. {ENDED}", flush=True)
                time.sleep(SETTLE_SECONDS)  # until whoever hides the log has shown it
                os._exit(1)  # to leave a Ray that is gone would take a minute, and its own abort
            time.sleep(POLL_SECONDS)
        if file is not None:
            file.unlink(missing_ok=True)


def _answers(head: str) -> bool:
    host, _, port = head.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        return False
    return True
