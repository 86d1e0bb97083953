"""Runs a study: each run is a process of its own; those that are done are left alone. Imports no verl."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from recipe.soup.compare.study import DRIVERS, Run, Study
from recipe.soup.settings import refuse

POLL_SECONDS = 0.5


def command(run: Run, driver: str) -> list[str]:
    """What a user would type for this run."""
    return [sys.executable, "-m", *DRIVERS[driver], *run.overrides]


def start(run: Run, driver: str) -> subprocess.Popen:
    """Start a run anew in its folder; its output goes to `log.txt` there."""
    shutil.rmtree(run.folder, ignore_errors=True)
    run.folder.mkdir(parents=True)
    line = command(run, driver)
    if driver == "main_ppo":
        line.append(f"+ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH='{run.metrics}'")
        line.append(f"hydra.run.dir='{run.folder / 'hydra'}'")
    (run.folder / "command.txt").write_text(shlex.join(line) + "\n")
    environ = {**os.environ, "VERL_FILE_LOGGER_PATH": str(run.metrics)}
    with (run.folder / "log.txt").open("w") as log:
        return subprocess.Popen(line, env=environ, stdout=log, stderr=subprocess.STDOUT)


def execute(study: Study, out: Path, jobs: int) -> list[Run]:
    """Run what is not done yet, several at a time; returns those that failed.

    Args:
        out: the study's folder; a study that was killed goes on there.
        jobs: runs beside each other; on the real path 1, since each is a Ray cluster of its own.
    """
    if jobs > 1 and study.driver == "main_ppo":
        raise refuse("--jobs", jobs, "on the real path each run takes the whole machine; use 1.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no run outlives this process
    waiting = [run for run in study.in_folder(out) if not run.is_done]
    total = len(study.in_folder(out))
    running: list[tuple[Run, subprocess.Popen]] = []
    failed: list[Run] = []
    with tqdm(total=total, initial=total - len(waiting), unit="run", desc=out.name) as progress:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    running.append((run, start(run, study.driver)))
                progress.set_postfix_str(", ".join(f"{run.name} seed {run.seed}" for run, _ in running))
                time.sleep(POLL_SECONDS)
                for item in [item for item in running if item[1].poll() is not None]:
                    run, process = item
                    running.remove(item)
                    if process.returncode == 0:
                        run.mark_done()
                    else:
                        failed.append(run)
                        tail = (run.folder / "log.txt").read_text().strip().splitlines()[-1:]
                        progress.write(
                            f"{run.name} seed {run.seed} failed: {' '.join(tail)} (see {run.folder}/log.txt)"
                        )
                    progress.update()
        finally:
            for _, process in running:
                process.terminate()
                process.wait()
    return failed
