"""The lab killed by SIGKILL at random moments, saving after every step: it goes on with the same numbers each time.

KILLS=20 python -m pytest -m real_more tests/recipe/soup/lab/test_kills.py -s
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recipe.soup.prefixes.bank import PrefixBank
from recipe.soup.records.earlier_runs import TRACKER
from recipe.soup.records.metrics_file import read_metrics

pytestmark = pytest.mark.real_more

KILLS = int(os.environ.get("KILLS", "5"))
STEPS = 400
AT_WORK = 2.0  # seconds after the first new checkpoint, which is several steps
RUN = (
    *("algorithm=soup", "example=countdown", "data.train_batch_size=4", "data.val_max_samples=4"),
    *("trainer.total_epochs=100", f"trainer.total_training_steps={STEPS}", "trainer.logger=[file]"),
    *("trainer.val_before_train=false", "trainer.test_freq=-1", "trainer.save_freq=1", "trainer.resume_mode=auto"),
    *("trainer.default_local_dir=checkpoints", "trainer.max_actor_ckpt_to_keep=2"),
    *("actor_rollout_ref.actor.ppo_mini_batch_size=2", "actor_rollout_ref.rollout.n=4", "algorithm.soup.lag=3"),
)
TIMES = ("timing_s/", "perf/")


def start(folder: Path, environ: dict[str, str]) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    with (folder / "terminal.txt").open("a") as out:
        command = [sys.executable, "-m", "recipe.soup.lab", *RUN]
        return subprocess.Popen(command, cwd=folder, env=environ, stdout=out, stderr=out)


def last_saved(folder: Path) -> int:
    tracker = folder / "checkpoints" / TRACKER
    return int(tracker.read_text()) if tracker.exists() else 0


def run_until(folder: Path, environ: dict[str, str], step: int, more: float) -> None:
    """Kill it so many seconds after it has saved this step."""
    with start(folder, environ) as run:
        deadline = time.monotonic() + 300
        while last_saved(folder) < step and time.monotonic() < deadline:
            assert run.poll() is None, (folder / "terminal.txt").read_text()[-2000:]
            time.sleep(0.02)
        time.sleep(more)
        run.kill()


def test_numbers_are_those_of_a_run_that_was_killed_once(tmp_path: Path, clean_environ: dict[str, str]) -> None:
    moments, killed = random.Random(0), tmp_path / "killed"
    for number in range(KILLS):
        before = last_saved(killed)
        run_until(killed, clean_environ, before + 1, moments.uniform(0, AT_WORK))
        saved = last_saved(killed)
        assert PrefixBank.load(killed / "checkpoints" / f"global_step_{saved}" / "soup_bank.npz")[1] > 0
        print(f"kill {number + 1}: checkpoint {saved} (was {before})", flush=True)
    whole = tmp_path / "whole"
    run_until(whole, clean_environ, saved, more=1.0)
    expected, found = (read_metrics(next(folder.rglob("*.jsonl"))) for folder in (whole, killed))
    for step in range(1, saved):  # a kill may come between the last checkpoint and its metrics
        if step in found:
            now, then = ({k: v for k, v in of[step].items() if not k.startswith(TIMES)} for of in (found, expected))
            assert now == pytest.approx(then, rel=1e-6, abs=1e-9), step
    missing = [step for step in range(1, saved) if step not in found]
    print(f"{saved} steps, {KILLS} kills; steps whose metrics a kill took along: {missing}")
    assert len(missing) <= KILLS
