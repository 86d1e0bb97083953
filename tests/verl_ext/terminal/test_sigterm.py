"""SIGTERM and Ctrl-C to a driver of Ray's: Ray itself would abort it after three seconds, without a word."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from verl_ext.terminal.sigterm import FinishAtSigterm

APP = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores for what runs behind it
import time
from pathlib import Path

import hydra
import ray
from hydra.core.config_store import ConfigStore

CALLBACKS = {
    "last_words": {"_target_": "verl_ext.terminal.last_words.LastWords"},
    "sigterm": {"_target_": "verl_ext.terminal.sigterm.FinishAtSigterm", "folder": "saved", "seconds": "${seconds}"},
}
DEFAULTS = {"seconds": 0, "trainer": {"default_local_dir": "saved"}}
ConfigStore.instance().store(
    "app", {**DEFAULTS, "hydra": {"callbacks": CALLBACKS, "output_subdir": None, "run": {"dir": "."}}}
)

@ray.remote
class Trainer:
    def fit(self, folder):
        asked = Path(folder) / "stop_after_this_step"
        for step in range(600):
            print("step", step, flush=True)
            time.sleep(0.1)
            if asked.exists():
                time.sleep(4)
                (asked.parent / "latest_checkpointed_iteration.txt").write_text(str(step))
                asked.unlink()

@hydra.main(version_base=None, config_name="app")
def main(config):
    ray.init(address="local", num_cpus=2, include_dashboard=False)
    ray.get(Trainer.remote().fit.remote(str(Path("saved").absolute())))

main()
"""
BY_SIGTERM = "The run was ended by SIGTERM. "
NO_CHECKPOINT = "It had not saved a checkpoint."


@pytest.mark.parametrize(
    ("number", "to", "seconds", "last"),
    [
        (signal.SIGTERM, "driver", 0, BY_SIGTERM + NO_CHECKPOINT),
        (signal.SIGTERM, "driver", 60, BY_SIGTERM + "The last checkpoint is saved/global_step_"),
        (signal.SIGTERM, "all", 600, "SIGTERM came to Ray as well, so that nothing could be saved any more. "),
        (signal.SIGINT, "driver", 60, "The run was ended by an interrupt (SIGINT). " + NO_CHECKPOINT),
    ],
)
def test_the_last_line_says_by_what_the_run_was_ended_and_where_it_goes_on(
    number: signal.Signals, to: str, seconds: int, last: str, tmp_path: Path
) -> None:
    (tmp_path / "app.py").write_text(APP)
    out = tmp_path / "out.txt"
    environ = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    with out.open("w") as file:
        command = [sys.executable, "app.py", f"seconds={seconds}"]
        run = subprocess.Popen(command, cwd=tmp_path, env=environ, stdout=file, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 120
        while "step 3" not in out.read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        driver = psutil.Process(run.pid)
        for process in [driver, *(driver.children(recursive=True) if to == "all" else [])]:
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)
        assert run.wait(60) > 0  # not ended by a signal
    assert out.read_text().splitlines()[-1].startswith(last)
    assert to == "all" or not (tmp_path / "saved" / "stop_after_this_step").exists()


@pytest.mark.parametrize("value", [None, "abc", [60]])
def test_what_is_no_number_is_left_to_the_checks(value: Any, tmp_path: Path) -> None:
    """Hydra makes callbacks before any check has seen the config."""
    FinishAtSigterm(str(tmp_path), value)
