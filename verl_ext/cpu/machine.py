"""Check that a machine is fit for the CPU path, before the installation (`make` runs this file) and before a run.

Imports the standard library only, since nothing else is there before the installation.
"""

from __future__ import annotations  # so that an older Python gets as far as saying that it is too old

import argparse
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

GB = 10**9
INSTALLED_GB = 6
"""Disk space for the installation: the environment takes 4 GB, and pip unpacks beside it."""
PYTHON = (3, 11)
CGROUP = Path("/sys/fs/cgroup")
FREE_MEMORY_GB = 7
"""The processes of the countdown example take 7.3 GB together, in proportional set sizes."""
SHARED_MEMORY_GB = 0.18
"""Needed in addition to the bucket in which weights travel to vLLM. A container's /dev/shm has 0.064 GB by default."""
FREE_DISK_GB = 1


def _free(folder: Path) -> float:
    """Return the GB that are free where the folder is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free / GB


def _available_memory() -> float:
    """Return the GB that processes can still get, on this machine or in this container."""
    rows = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    available = next(int(row[1]) * 1024 for row in rows if row[0] == "MemAvailable:")
    limit, used = (CGROUP / name for name in ("memory.max", "memory.current"))
    if limit.exists() and limit.read_text().strip() != "max":
        statistics = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        kept = int(used.read_text()) - int(statistics["inactive_file"])  # the kernel would give the inactive files back
        available = min(available, int(limit.read_text()) - kept)
    return available / GB


def before_installation(folder: Path) -> Iterable[str]:
    """Yield a sentence for each obstacle to an environment in `folder`."""
    system, machine = platform.system(), platform.machine()
    if (system, machine) != ("Linux", "x86_64"):
        yield f"This is {system} on {machine}, but vLLM's CPU build is pinned for Linux on x86_64: use such a machine."
    if sys.version_info[:2] != PYTHON:
        version, wanted = platform.python_version(), ".".join(map(str, PYTHON))
        yield f"This is Python {version}, but versions are pinned for {wanted}: give PYTHON=/path/to/python{wanted}."
    if _free(folder) < INSTALLED_GB:
        yield (
            f"{_free(folder):.1f} GB are free for {folder}, but the environment needs {INSTALLED_GB} GB: make room, or "
            "give VENV=/path/on/another/disk."
        )


def before_run(bucket_megabytes: int = 64) -> Iterable[str]:
    """Yield a sentence for each lack for which a run would die obscurely on this machine.

    Args:
        bucket_megabytes: size of one bucket of weights, in MiB.
    """
    shared, needed = _free(Path("/dev/shm")), SHARED_MEMORY_GB + bucket_megabytes * 2**20 / GB
    if shared < needed:
        yield (
            f"/dev/shm has {shared * 1000:.0f} MB free, but weights travel through it and need {needed * 1000:.0f} MB: "
            f"start the container with --shm-size={needed + 1.5:.0f}g."
        )
    for folder in (Path.cwd(), Path(tempfile.gettempdir())):
        if _free(folder) < FREE_DISK_GB:
            yield f"{_free(folder):.1f} GB are free in {folder}, but a run needs {FREE_DISK_GB} GB there: make room."


def memory_warning() -> str | None:
    """Return a sentence if a run may be killed for lack of memory; how much it needs depends on the model."""
    available = _available_memory()
    if available >= FREE_MEMORY_GB:
        return None
    return (
        f"{available:.1f} GB of memory are free, but the processes of a small run take {FREE_MEMORY_GB} GB: if the "
        "run is killed, close something, or see whether an earlier run is still there."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("environment", type=Path, help="folder that it will be installed in")
    problems = list(before_installation(parser.parse_args().environment.absolute()))
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main()
