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

import pandas as pd
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
    "data.shuffle=false",  # so that the prompts of each step are known without another run
)
BATCH = 8


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
        # verl pickles distributed tensors and the data loader's state; the file was written by this test's own run.
        assert torch.load(folder / name, weights_only=False)


def kill_once(folder: Path, environ: dict[str, str], moments: random.Random) -> Killed:
    """A run that goes on in this folder, and SIGKILL to the process that the user started; Ray ends the others."""
    run = RealRun(folder, environ, *RUN)
    began, before = time.monotonic(), last_saved(run)
    # Most of them at work, of whose parts a checkpoint is one; the others on the way there.
    if at_work := moments.random() < 0.8:
        run.wait_for(run.checkpoints / f"global_step_{before + 1}" / "soup_bank.npz", STARTED)
    time.sleep(moments.uniform(0, AT_WORK))
    there = run.descendants()
    run.process.kill()
    run.process.wait()
    killed = time.monotonic()
    left = psutil.wait_procs(there, timeout=GONE)[1]
    print(
        f"killed {killed - began:.1f} s after its start, {'at work' if at_work else 'on the way'}: checkpoint "
        f"{last_saved(run)} (was {before}), samples up to {last_dumped(run)}, all processes gone after "
        f"{time.monotonic() - killed:.1f} s",
        flush=True,
    )
    run.stop()
    assert not left
    assert_whole(run)
    return Killed(run, [last_saved(run)])


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, clean_environ: dict[str, str]) -> Killed:
    """`KILLS` times killed, and then to its end."""
    folder, moments = tmp_path_factory.mktemp("killed"), random.Random(SEED)
    saved = [step for _ in range(KILLS) for step in kill_once(folder, clean_environ, moments).saved]
    run = RealRun(folder, clean_environ, *RUN)
    assert run.finish(STARTED + 10 * STEPS) == 0, run.log[-4000:]
    return Killed(run, saved)


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


def test_every_step_has_the_prompts_and_versions_of_a_run_that_was_never_killed(
    killed: Killed, countdown_dir: Path
) -> None:
    truths = pd.read_parquet(countdown_dir / "data" / "train.parquet")["reward_model"]
    found = readable(killed.run)
    # verl writes samples and metrics after the checkpoint of their step, so a kill in between takes them along.
    missing = set(range(1, STEPS + 1)) - set(found)
    print(f"steps without samples: {sorted(missing)}, of checkpoints {killed.saved}")
    assert missing <= set(killed.saved)
    for step, rows in found.items():
        expected = [row["ground_truth"] for row in truths[BATCH * (step - 1) : BATCH * step]]
        assert prompts(rows) == Counter([(tuple(t["numbers"]), t["target"]) for t in expected] * 8), step
        assert versions_of_prefixes(rows) == ({step - 3} if step >= 3 else set()), step
        assert sum(row["prefix_length"] > 0 for row in rows) == (32 if step >= 3 else 0)


def test_every_log_prob_is_exact_across_the_kills(killed: Killed, countdown_dir: Path) -> None:
    readable(killed.run)
    assert_exact(verify(killed.run.samples, killed.run.checkpoints, str(countdown_dir / "base_model")))


def test_metrics_of_all_steps_are_kept(killed: Killed) -> None:
    metrics = killed.run.metrics("soup")
    assert set(range(1, STEPS + 1)) - set(metrics) <= set(killed.saved)
