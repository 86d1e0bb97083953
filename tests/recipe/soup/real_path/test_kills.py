"""A run that is killed at random moments, again and again, goes on each time as if nothing had been.

KILLS=20 python -m pytest -m real_more tests/recipe/soup/real_path/test_kills.py -s
"""

import json
import os
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import torch
from real_run import STARTED, RealRun, assert_exact, versions_of_prefixes

from recipe.soup.prefixes.bank import PrefixBank
from recipe.soup.tools.verify import read_samples, verify

pytestmark = pytest.mark.real_more

KILLS = int(os.environ.get("KILLS", "3"))
SEED = int(os.environ.get("KILLS_SEED", "0"))
STEPS = 8 + 2 * KILLS
AT_WORK = 10.0  # seconds after the first new step, which is several steps
GONE = 120.0
RUN = (
    "algorithm=soup",
    "algorithm.soup.lag=2",
    "algorithm.soup.warm_start=pure",
    f"trainer.total_training_steps={STEPS}",
    "trainer.total_epochs=100",
    "trainer.resume_mode=auto",
)


@dataclass
class Killed:
    """A run's folder, and the last step that each of its kills left a checkpoint of."""

    run: RealRun
    saved: list[int] = field(default_factory=list)


def last_saved(run: RealRun) -> int:
    tracker = run.checkpoints / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.exists() else 0


def last_dumped(run: RealRun) -> int:
    return max((int(path.stem) for path in run.samples.glob("*.jsonl")), default=0)


def assert_whole(run: RealRun) -> None:
    """The checkpoint that the tracker names can be read, every part of it."""
    folder = run.checkpoints / f"global_step_{last_saved(run)}"
    if last_saved(run) == 0:
        return
    assert PrefixBank.load(folder / "soup_bank.npz")[1] > 0
    for name in ("data.pt", "actor/model_world_size_1_rank_0.pt", "actor/optim_world_size_1_rank_0.pt"):
        assert torch.load(folder / name, weights_only=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, clean_environ: dict[str, str]) -> RealRun:
    run = RealRun(tmp_path_factory.mktemp("whole"), clean_environ, *RUN)
    assert run.finish(STARTED + 10 * STEPS) == 0, run.log[-4000:]
    return run


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, clean_environ: dict[str, str]) -> Killed:
    """`KILLS` times SIGKILL to the process that the user started; its own end comes from Ray."""
    folder, moments, killed = tmp_path_factory.mktemp("killed"), random.Random(SEED), None
    for number in range(KILLS):
        run = RealRun(folder, clean_environ, *RUN)
        killed = killed or Killed(run)
        began, before = time.monotonic(), last_saved(run)
        # Most of them at work, of whose parts a checkpoint is one; the others on the way there.
        if moments.random() < 0.8:
            run.wait_for(run.checkpoints / f"global_step_{before + 1}" / "soup_bank.npz", STARTED)
        time.sleep(moments.uniform(0, AT_WORK))
        there = run.descendants()
        run.process.kill()
        run.process.wait()
        now = time.monotonic()
        left = psutil.wait_procs(there, timeout=GONE)[1]
        print(
            f"kill {number + 1}: {now - began:.1f} s after its start, checkpoint {last_saved(run)} (was {before}), "
            f"samples up to {last_dumped(run)}; all processes gone after {time.monotonic() - now:.1f} s",
            flush=True,
        )
        run.stop()
        assert not left
        assert_whole(run)
        killed.saved.append(last_saved(run))
    assert killed is not None
    killed.run = RealRun(folder, clean_environ, *RUN)
    assert killed.run.finish(STARTED + 10 * STEPS) == 0, killed.run.log[-4000:]
    return killed


def readable(run: RealRun) -> dict[int, list[dict]]:
    """Samples by step, without files that a kill has torn; such a file is removed."""
    for path in run.samples.glob("*.jsonl"):
        try:
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            torn = len(rows) < 64
        except ValueError:
            torn = True
        if torn:
            path.unlink()
    return read_samples(run.samples)


def prompts(rows: list[dict]) -> Counter:
    return Counter((tuple(row["gts"]["numbers"]), row["gts"]["target"]) for row in rows)


def test_every_step_has_the_prompts_and_versions_of_a_run_that_was_never_killed(whole: RealRun, killed: Killed) -> None:
    expected, found = readable(whole), readable(killed.run)
    assert sorted(expected) == list(range(1, STEPS + 1))
    # verl writes samples and metrics after the checkpoint of their step, so a kill in between takes them along.
    missing = set(expected) - set(found)
    print(f"steps without samples: {sorted(missing)}, of checkpoints {killed.saved}")
    assert missing <= set(killed.saved)
    for step, rows in found.items():
        assert prompts(rows) == prompts(expected[step]), step
        assert versions_of_prefixes(rows) == versions_of_prefixes(expected[step]), step
        assert sum(row["prefix_length"] > 0 for row in rows) == (32 if step >= 3 else 0)


def test_every_log_prob_is_exact_across_the_kills(killed: Killed, countdown_dir: Path) -> None:
    readable(killed.run)
    assert_exact(verify(killed.run.samples, killed.run.checkpoints, str(countdown_dir / "base_model")))


def test_metrics_of_all_steps_are_kept(killed: Killed) -> None:
    metrics = killed.run.metrics("soup")
    assert set(range(1, STEPS + 1)) - set(metrics) <= set(killed.saved)
