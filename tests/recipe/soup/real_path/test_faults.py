"""What a user sees when something is killed, hangs or runs full, and how long it takes until the run has ended."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from real_run import STARTED, RealRun

from recipe.soup.prefixes.bank import PrefixBank
from recipe.soup.records.earlier_runs import TRACKER
from verl_ext.causes import KILLED

pytestmark = pytest.mark.real_more

SHORT = ("algorithm=soup", "algorithm.soup.lag=2", "trainer.total_training_steps=500", "trainer.save_freq=-1")
HANGING = Path(__file__).parents[3] / "support" / "hanging_reward.py"


def processes(run: RealRun, name: str) -> list[psutil.Process]:
    """The run's processes whose title has this word, oldest first."""
    found = [process for process in run.descendants() if name in " ".join(process.cmdline())]
    return sorted(found, key=lambda process: process.create_time())


def kill(name: str, which: int = 0) -> Callable[[RealRun], None]:
    """As the kernel does where memory is short."""
    return lambda run: processes(run, name)[which].kill()


def tell(number: signal.Signals) -> Callable[[RealRun], None]:
    """A signal to the process that the user started."""
    return lambda run: os.kill(run.process.pid, number)


def nothing(run: RealRun) -> None:
    """The fault comes by itself."""


@dataclass(frozen=True)
class Fault:
    """What happens to a run after its second step, and what its last line then is."""

    inject: Callable[[RealRun], None]
    last: str
    overrides: tuple[str, ...] = ()
    seconds: float = 60.0


PAST = ("algorithm.soup.source=snapshot", "algorithm.soup.snapshot.every=1")
FAULTS = {
    "vLLM engine": Fault(kill("VLLM::EngineCore"), "The vLLM engine of rollout replica 0 died"),
    "historical vLLM engine": Fault(kill("VLLM::EngineCore", 1), "The vLLM engine of rollout replica 1 died", PAST),
    "agent loop": Fault(kill("ray::AgentLoopWorker"), "The agent-loop worker 0 died"),
    "reward": Fault(kill("ray::RewardLoopWorker"), "The reward worker 0 died"),
    "storage": Fault(kill("ray::SimpleStorageUnit"), "The TransferQueue storage unit 0 died"),
    "controller": Fault(kill("ray::TransferQueueController"), "The TransferQueue controller died"),
    "training worker": Fault(kill("ray::WorkerDict"), f"WorkerDict {KILLED}"),
    "trainer": Fault(kill("ray::TaskRunner"), f"class_name: TaskRunnerV1 {KILLED}"),
    "SIGINT": Fault(tell(signal.SIGINT), "The run was ended by an interrupt (SIGINT). It had not saved a checkpoint."),
    "SIGTERM": Fault(tell(signal.SIGTERM), "The run was ended by SIGTERM. It had not saved a checkpoint."),
    "SIGTERM with grace": Fault(
        tell(signal.SIGTERM),
        "The run was ended by SIGTERM. The last checkpoint is checkpoints/global_step_",
        ("trainer.save_freq=1000", "algorithm.soup.sigterm_grace=120"),
    ),
    "reward that hangs": Fault(
        nothing,
        f"A reward is still being computed: compute_score ({HANGING}, line 8)",
        (f"reward.custom_reward_function.path={HANGING}", "algorithm.soup.max_wait=20"),
        STARTED,
    ),
    "prompt too long": Fault(nothing, "more than data.max_prompt_length=8;", ("data.max_prompt_length=8",), STARTED),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_ends_the_run_and_the_last_line_names_it(
    name: str, tmp_path: Path, clean_environ: dict[str, str]
) -> None:
    fault = FAULTS[name]
    run = RealRun(tmp_path, clean_environ, *SHORT, *fault.overrides)
    try:
        if fault.inject is not nothing:
            run.wait_for(run.samples / "2.jsonl", STARTED)
        there = run.descendants()
        began = time.monotonic()
        fault.inject(run)
        code = run.process.wait(max(120, fault.seconds))
        ended = time.monotonic() - began
        left = psutil.wait_procs(there, timeout=90)[1]
        print(f"\nFAULT {name}: rc {code}, {ended:.1f} s; all gone {time.monotonic() - began:.1f} s, left {left}")
        print("\n".join(run.terminal.splitlines()[-6:]))
    finally:
        run.stop()
    assert code != 0
    assert ended < fault.seconds
    assert fault.last in run.terminal.splitlines()[-1]


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        # A disk of the machine's own must not be filled for it.
        pytest.skip("only root may mount a file system of a given size")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_ends_the_run_and_the_last_whole_checkpoint_stays(
    tmp_path: Path, clean_environ: dict[str, str]
) -> None:
    checkpoints = tmp_path / "checkpoints"
    with small_disk(checkpoints, megabytes=16):
        run = RealRun(tmp_path, clean_environ, *SHORT[:-1], "trainer.save_freq=1")
        assert run.finish(STARTED) != 0
        last, step = run.terminal.splitlines()[-1], int((checkpoints / TRACKER).read_text())
        print(last)
        assert step >= 1
        assert f"The checkpoint of step {step + 1} could not be written to checkpoints, where" in last
        assert f"The last whole one is of step {step}." in last
        assert sorted(path.name for path in checkpoints.glob("global_step_*")) == [
            f"global_step_{number}" for number in range(1, step + 1)
        ]
        assert PrefixBank.load(checkpoints / f"global_step_{step}" / "soup_bank.npz")[1] > 0
