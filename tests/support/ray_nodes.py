"""Two nodes of a Ray cluster on one host, for runs with `trainer.nnodes=2`."""

import contextlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from verl_ext.cpu import CPU_ENV

JOIN = (
    "~ray_kwargs.ray_init.num_cpus",
    "~ray_kwargs.ray_init.num_gpus",
    "~ray_kwargs.ray_init.object_store_memory",
    "~ray_kwargs.ray_init.include_dashboard",
)
"""Overrides of `hardware=cpu` for a Ray that is there already, beside its address."""
COMMON = (
    *("--block", "--num-cpus=16", "--object-store-memory=1000000000", "--disable-usage-stats"),
    *("--min-worker-port=0", "--max-worker-port=0"),  # any that is free
)


class Nodes:
    """A head with one logical GPU, and a second node with two."""

    def __init__(self, folder: Path, environ: dict[str, str]) -> None:
        # A node without the others' token would be turned away.
        self.environ = {**environ, **CPU_ENV, "RAY_AUTH_MODE": "disabled"}
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        # Ray's sockets lie in it, and their paths must be short.
        self._ray = Path(f"/tmp/ray-{self.address.rpartition(':')[2]}")
        self._started: list[subprocess.Popen] = []

    def start(self) -> None:
        port = f"--port={self.address.rpartition(':')[2]}"
        self._start("head", "--head", port, "--num-gpus=1", "--include-dashboard=false", f"--temp-dir={self._ray}")
        self._start("second", f"--address={self.address}", "--num-gpus=2")

    @property
    def overrides(self) -> list[str]:
        return [*JOIN, f"ray_kwargs.ray_init.address={self.address}", "trainer.nnodes=2"]

    def _start(self, name: str, *arguments: str) -> None:
        out = self.folder / f"{name}.txt"
        with out.open("w") as file:
            command = [sys.executable, "-m", "ray.scripts.scripts", "start", *COMMON, *arguments]
            process = subprocess.Popen(command, cwd=self.folder, env=self.environ, stdout=file, stderr=file)
        self._started.append(process)
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in out.read_text():
            assert process.poll() is None, out.read_text()
            assert time.monotonic() < deadline, out.read_text()
            time.sleep(0.5)

    def kill_second(self) -> None:
        """As a power cut would."""
        _kill(self._started[1])

    def stop(self) -> None:
        for process in reversed(self._started):
            _kill(process)
        shutil.rmtree(self._ray, ignore_errors=True)


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        found = psutil.Process(process.pid)
        for one in [*found.children(recursive=True), found]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


@contextlib.contextmanager
def two_nodes(folder: Path, environ: dict[str, str]) -> Iterator[Nodes]:
    """Workers have `folder` as their own, so that relative paths mean what they mean to the driver."""
    nodes = Nodes(folder, environ)
    try:
        nodes.start()
        yield nodes
    finally:
        nodes.stop()
