"""Run a study's runs as tasks on a Ray cluster, whose nodes see environment and study under the same paths."""

import os
import subprocess
from collections.abc import Callable

import ray
from ray.exceptions import RayError

from verl_ext.errors import last_line


@ray.remote(num_cpus=1, max_retries=0)
def run_to_end(start: Callable[[], subprocess.Popen], folder: str) -> int:
    """Start a run on whichever node has a free core, and wait for it; returns its exit status."""
    os.chdir(folder)  # relative paths start at the user's folder, not at that of Ray's workers
    process = start()
    try:
        return process.wait()
    finally:
        process.terminate()  # a cancelled task leaves no process behind


class RayRun:
    """A run on the cluster, with the methods that `subprocess.Popen` has for one on this machine.

    Args:
        start: starts the run where it is called.
    """

    def __init__(self, start: Callable[[], subprocess.Popen]) -> None:
        self.error = ""
        self._task = run_to_end.remote(start, os.getcwd())

    def poll(self) -> int | None:
        """Return None while it runs, else its exit status; 1 if its node is lost."""
        return self._status() if ray.wait([self._task], timeout=0)[0] else None

    def terminate(self) -> None:
        """Stop the run."""
        ray.cancel(self._task)

    def kill(self) -> None:
        """Stop the run at once."""
        ray.cancel(self._task, force=True)

    def wait(self) -> int:
        """Wait for the run's end; returns its exit status."""
        return self._status()

    def _status(self) -> int:
        try:
            return ray.get(self._task)
        except RayError as error:
            self.error = last_line(error)
            return 1
