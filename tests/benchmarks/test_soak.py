"""The soak's numbers, from processes and logs of which they are known."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.soak import growth, memory, quarters, report, steps_done

WASTE = "import time; waste = bytearray(b'x') * (200 * 2**20); print('ready', flush=True); time.sleep(60)"


def test_memory_is_that_of_the_run_s_own_processes() -> None:
    command = [sys.executable, "-c", WASTE, "ray::WorkerDict"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"ready\n"
        found = memory(psutil.Process(os.getpid()))
        worker.kill()
    assert 200 <= found["training worker"] < 240
    assert found["driver"] > 20
    assert "agent loop" not in found


def leave(out: Path, gained: float, steps: int = 100) -> None:
    """A run that gains so many megabytes each step in its second half, after a start that says nothing."""
    runs = out / "run" / "runs" / "countdown"
    runs.mkdir(parents=True)
    seconds = [{"step": s, "data": {"timing_s/step": 2.0 + s // 50}} for s in range(1, steps + 1)]
    (runs / "soup.jsonl").write_text("".join(json.dumps(row) + "\n" for row in seconds))
    samples = [{"seconds": 0.0, "step": 0, "mb": {"driver": 1.0}}]
    for step in range(1, steps + 1):
        mb = {"driver": 100.0, "trainer": 300 + gained * max(step, steps // 2), "vLLM engine": 900 + step % 2}
        samples.append({"seconds": 10.0 * step, "step": step, "mb": mb})
    (out / "memory.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))


def test_growth_is_told_in_megabytes_for_a_hundred_steps(tmp_path: Path) -> None:
    leave(tmp_path, gained=0.5)
    samples = [json.loads(line) for line in (tmp_path / "memory.jsonl").read_text().splitlines()]
    found = growth(samples)
    assert found["trainer"] == pytest.approx((350, 50))
    assert found["driver"] == pytest.approx((100, 0), abs=1e-6)
    assert abs(found["vLLM engine"][1]) < 1
    assert quarters([1, 1, 2, 2, 3, 3, 4, 4]) == [1, 2, 3, 4]
    assert steps_done(tmp_path / "run") == 100
    assert steps_done(tmp_path) == 0


def test_the_report_has_a_table_and_a_picture(tmp_path: Path) -> None:
    leave(tmp_path, gained=0.5)
    began = time.time()
    said = report(tmp_path)
    assert "| trainer | 350 | +50.00 |" in said
    assert "100 steps; seconds a step in the quarters of the run: 2.00, 2.04, 3.00, 3.04." in said
    assert (tmp_path / "soak.png").stat().st_mtime >= began - 1
