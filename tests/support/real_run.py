"""Starts `python -m verl.trainer.main_ppo` as a user would, and never leaves a process behind."""

import contextlib
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil

from recipe.soup.records.metrics_file import read_metrics
from recipe.soup.tools.exactness import Bounds, Comparison, broken

EXACT = Bounds()
ENGINE_MEAN = 2e-6  # nats
STARTED = 600.0  # seconds until the first steps are through, on a busy machine

COMMON = (
    "hardware=cpu",
    "example=countdown",
    "data.train_batch_size=8",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.actor.optim.lr=3e-4",
    "trainer.val_before_train=false",
    "trainer.test_freq=-1",
    "data.val_max_samples=32",
    "trainer.save_freq=1",
    "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]",
    "trainer.rollout_data_dir=samples",
    "hydra.callbacks.console.log=log.txt",
    "trainer.default_local_dir=checkpoints",
)


class RealRun:
    """One run in a folder of its own.

    Args:
        folder: the run's working directory; gets `log.txt` (of verl), `terminal.txt` (what a user sees), `samples/`,
            `checkpoints/` and `runs/`.
        environ: the environment of the process.
        overrides: on top of `common`.
        common: what all runs of this kind have.
    """

    def __init__(self, folder: Path, environ: dict[str, str], *overrides: str, common: Sequence[str] = COMMON) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "verl.trainer.main_ppo", *common, *overrides]
        self._out = (folder / "terminal.txt").open("w")
        self.process = subprocess.Popen(command, cwd=folder, env=environ, stdout=self._out, stderr=subprocess.STDOUT)

    @property
    def terminal(self) -> str:
        return (self.folder / "terminal.txt").read_text()

    @property
    def log(self) -> str:
        """What verl's log holds, and after it what the user saw."""
        log = self.folder / "log.txt"
        return (log.read_text() if log.exists() else "") + self.terminal

    @property
    def samples(self) -> Path:
        return self.folder / "samples"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def descendants(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def wait_for(self, path: Path, seconds: float) -> None:
        """Until `path` exists; fails with the end of the log if the run ends or the time is up before."""
        deadline = time.monotonic() + seconds
        while not path.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise AssertionError(f"no {path.name}; end of the log:\n{self.log[-4000:]}")
            time.sleep(0.5)

    def finish(self, seconds: float) -> int:
        """Exit code, once the run is over."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds:.0f} s; end of the log:\n{self.log[-4000:]}") from None
        finally:
            self.stop()

    def stop(self) -> None:
        for process in [*self.descendants(), self.process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        self._out.close()

    def copy_checkpoints(self, folder: Path, up_to: int) -> None:
        """Into another run's folder, as if this run had been killed after step `up_to`."""
        copy = folder / "checkpoints"
        shutil.copytree(self.checkpoints, copy)
        for path in copy.glob("global_step_*"):
            if int(path.name.removeprefix("global_step_")) > up_to:
                shutil.rmtree(path)
        (copy / "latest_checkpointed_iteration.txt").write_text(str(up_to))

    def metrics(self, experiment: str) -> dict[int, dict[str, float]]:
        """What verl's file logger wrote of example=countdown, by step."""
        return self.metrics_of("countdown", experiment)

    def metrics_of(self, project: str, experiment: str) -> dict[int, dict[str, float]]:
        """What verl's file logger wrote, by step."""
        return read_metrics(self.folder / "runs" / project / f"{experiment}.jsonl")


def assert_exact(comparisons: dict[str, Comparison], bounds: Bounds = EXACT) -> None:
    assert not (said := list(broken(comparisons, bounds))), said


def assert_engine_agrees(metrics: Iterable[dict[str, float]], segment: str, largest: float = EXACT.largest) -> None:
    """vLLM and the trainer compute in other orders: equal but for rounding, and not the same number twice."""
    for values in metrics:
        assert 0 < values[f"soup/{segment}/engine_mismatch/mean"] < ENGINE_MEAN
        assert values[f"soup/{segment}/engine_mismatch/max"] < largest


def versions_of_prefixes(rows: list[dict]) -> set[int]:
    return {version for row in rows for version in row["policy_versions"][: row["prefix_length"]]}


def assert_goes_on(before: dict[int, list[dict]], after: dict[int, list[dict]], lag: int) -> None:
    """A resumed run of an asynchronous trainer mixes from its first step on, and leaves no prompt out.

    Args:
        before: samples by step of the run that was to be killed; it went on, so it tells which prompts come.
        after: samples by step of the run that was resumed in the middle.
    """
    first, last = min(after), max(after)
    assert any(version < first - lag for row in after[first] for version in row["policy_versions"])
    trained = Counter(tuple(row["prompt_ids"]) for step, rows in before.items() if step < first for row in rows)
    trained.update(tuple(row["prompt_ids"]) for rows in after.values() for row in rows)
    # What was under way when either ended differs, so the last step is left out.
    expected = Counter(tuple(row["prompt_ids"]) for step, rows in before.items() if step < last for row in rows)
    assert not expected - trained
    assert trained.total() == sum(map(len, before.values()))
