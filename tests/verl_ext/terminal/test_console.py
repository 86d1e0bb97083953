"""What the terminal shows while verl's log goes to a file."""

import contextlib
import inspect
import io
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ray._private.worker
import verl.trainer.ppo.metric_utils as metric_utils
import verl.trainer.ppo.v1.trainer_base as trainer_base
import verl.utils.logger.aggregate_logger as aggregate_logger

from verl_ext.health import ENDED, NOTICE
from verl_ext.terminal.console import Display
from verl_ext.terminal.run_progress import PHASES, SHOWN, RunProgress

LOG = """\
INFO worker.py:2038 -- Started a local Ray instance.
INFO:create worker group dict_keys(['actor_rollout'])
INFO:actor and ref model engine initialized
INFO:all initialize finished, ready to fit
"Initial validation metrics: {'val-core/countdown/acc/mean@16': 0.1}"
Training Progress:   0%|          | 0/20 [00:00<?, ?it/s]
step:1 - critic/score/mean:0.125 - critic/score/max:1.0 - timing_s/step:4.5 - actor/entropy:np.float64(0.25)
Training Progress:   5%|▌         | 1/20 [00:04<01:20,  4.5s/it]
""".splitlines()


def test_phases_steps_and_metrics() -> None:
    progress = RunProgress()
    assert progress.doing == "Ray starts"
    told = [progress.feed(line) for line in LOG]
    assert told == [True, True, True, True, False, True, True, False]
    assert (progress.doing, progress.step, progress.total) == ("training", 1, 20)
    assert progress.shown == {"reward": 0.125, "entropy": 0.25, "seconds": 4.5}
    assert not progress.feed("step 3 - no metrics of verl, and nothing of theirs")
    progress.feed("Final validation metrics: None")
    assert progress.doing == "workers stop"


def test_the_bar_may_come_before_its_steps_metrics() -> None:
    progress = RunProgress()
    for line in LOG:
        progress.feed(line)
    progress.feed("Training Progress:  10%|#         | 2/20 [00:08<01:12,  4.0s/it]")
    assert (progress.step, progress.shown["reward"]) == (1, 0.125)
    assert progress.feed("step:2 - critic/score/mean:0.5 - actor/entropy:-inf - actor/kl:nan")
    assert (progress.step, progress.shown) == (2, {"reward": 0.5})


def test_the_lines_are_those_of_verl_and_ray() -> None:
    """Each phase's line stands in the source that prints it."""
    trainer = inspect.getsource(trainer_base)
    sources = trainer + inspect.getsource(ray._private.worker) + inspect.getsource(aggregate_logger)
    made = {r"step:\d+ - ": 'f"step:{step}"', "Training Progress:": 'desc="Training Progress"'}
    for pattern, doing in PHASES[1:]:
        for line in pattern.split("|"):
            assert made.get(line, line) in sources, doing
    metrics = inspect.getsource(trainer_base) + inspect.getsource(metric_utils)
    assert all(key in metrics for key in SHOWN if not key.startswith("timing_s/"))
    assert 'marked_timer("step", self.timing_raw)' in trainer


def feed(lines: list[str]) -> str:
    out = io.StringIO()
    display = Display(out)
    display.start("hello")
    for line in lines:
        display.feed(line)
    display.stop()
    return out.getvalue()


def test_without_a_terminal_a_line_for_each_phase_and_a_few_for_the_steps() -> None:
    steps = [f"step:{step} - critic/score/mean:0.5" for step in range(2, 21)]
    shown = feed([*LOG, *steps])
    phases = [line.split("s  ", 1)[1] for line in shown.splitlines() if "  step " not in line and line != "hello"]
    assert phases == [doing for _, doing in PHASES[:-1]]
    assert shown.count("  step ") == 10
    assert "step 2/20: reward 0.5" in shown
    assert "step 20/20" in shown


def test_why_a_run_was_ended_is_shown() -> None:
    assert "The engine died. " + ENDED in feed([*LOG, f"The engine died. {ENDED}"])


def test_notices_are_shown_though_a_bar_stands_before_them() -> None:
    bar = "(TaskRunnerV1 pid=7) Training Progress:   5%|▌         | 1/20 [00:04<01:20,  4.5s/it]"
    shown = feed([*LOG, f"{bar}{NOTICE}step 3 lost a sample."])
    assert f"\n{NOTICE}step 3 lost a sample.\n" in shown
    assert "TaskRunner" not in shown


APP = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores for what runs behind it
import sys
import time
import hydra

@hydra.main(config_path=None, config_name=None, version_base=None)
def main(config):
    print("wall of log")
    print("Training Progress:   5%|▌         | 1/20 [00:04<01:20,  4.5s/it]")
    print("step:10 - critic/score/mean:0.5")
    if config.get("fail"):
        raise ValueError("the reason")
    if config.get("exit"):
        sys.exit("the last word")
    if config.get("wait"):
        time.sleep(60)

main()
"""


@pytest.mark.parametrize(
    ("ending", "code", "out", "err"),
    [
        ([], 0, "step 10/20: reward 0.5", ""),
        (["+fail=true"], 1, "step 10/20", "The run failed; what led to it is in logs/log.txt"),
        (["+exit=true"], 1, "step 10/20", "the last word"),
    ],
)
def test_a_job(ending: list[str], code: int, out: str, err: str, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP)
    console = CONSOLE % "logs/log.txt, expect: Patience."
    done = subprocess.run(
        [sys.executable, "app.py", console, *ending], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    log = (tmp_path / "logs/log.txt").read_text()
    assert "wall of log" in log
    assert "wall of log" not in done.stdout
    assert done.returncode == code
    assert "logs/log.txt" in done.stdout
    assert "Patience." in done.stdout
    assert out in done.stdout
    assert err in done.stderr
    if "+fail=true" in ending:
        assert "the reason" in done.stderr  # Hydra's own words, after the callback


def test_ctrl_c_ends_the_run_and_says_where_the_log_is(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP)
    command = [sys.executable, "app.py", CONSOLE % "log.txt", "+wait=true"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, text=True, stdout=pipe, stderr=pipe) as run:
        assert run.stdout is not None
        assert any("step 10/20" in line for line in run.stdout)  # the job is in its sleep
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=30)
    assert run.returncode != 0
    assert "The run ended early; the last lines of log.txt:" in err
    assert "KeyboardInterrupt" in err


CONSOLE = "+hydra.callbacks.console={_target_: verl_ext.terminal.console.QuietConsole, log: %s}"


def test_no_log_no_change(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP)
    command = [sys.executable, "app.py", CONSOLE % "null"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("wall of log")


def test_a_log_that_cannot_be_written_stays_in_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "file").touch()
    command = [sys.executable, "app.py", CONSOLE % "file/log.txt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("wall of log")
    assert "console.log=file/log.txt: File exists; the log goes here" in done.stderr


def test_a_reader_who_goes_away_does_not_take_the_log_along(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP)
    command = f"{sys.executable} app.py '{CONSOLE % 'log.txt'}' | head -n 1"
    subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, timeout=120, check=True)
    assert "step:10 - " in (tmp_path / "log.txt").read_text()


def test_in_a_terminal_there_is_a_bar_and_each_job_of_a_multirun_gives_it_back(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP.replace('print("step:10', 'time.sleep(1)\n    print("step:10'))
    master, slave = pty.openpty()
    command = [sys.executable, "app.py", "-m", CONSOLE % "log.txt", "+job=1,2"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=slave, stderr=slave) as process:
        os.close(slave)
        shown = b""
        with contextlib.suppress(OSError):  # how Linux says that the other end was closed
            while piece := os.read(master, 4096):
                shown += piece
    os.close(master)
    assert process.returncode == 0
    text = shown.decode(errors="replace")
    assert text.count("verl's log: log.txt") == 2
    assert text.count("  Ray starts (") == 2
    assert "1/20" in text
    assert "wall of log" not in text
    for log in ("log.txt", "log.txt.1"):
        assert "wall of log" in (tmp_path / log).read_text()
