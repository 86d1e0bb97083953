"""Run a study: each run is a process of its own, and those that are done are left alone."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from recipe.soup.errors import refuse
from recipe.soup.tools.compare.kept_runs import is_recorded, read_run, write_record
from recipe.soup.tools.compare.one_run import Run, quoted
from recipe.soup.tools.compare.study import DRIVERS, Study
from recipe.soup.tools.compare.time_limit import TimeLimit
from recipe.soup.tools.outputs import make_folder

POLL_SECONDS = 0.5
LEAVING_SECONDS = 60.0
"""That a run takes to leave Ray and vLLM after its last step, at most."""
COMMAND_FILE = "command.txt"
HYDRAS_ADVICE = "HYDRA_FULL_ERROR"
"""What the last line that Hydra writes after an exception contains; that line says nothing about the exception."""
SHOWN = 4
"""Number of running runs that the progress bar names."""


def command(run: Run, driver: str) -> list[str]:
    """Return the command that a user would type for this run."""
    line = [sys.executable, "-m", *DRIVERS[driver], *run.overrides]
    if driver == "main_ppo":
        line.append(f"+ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH={quoted(run.metrics)}")
        line.append(f"hydra.run.dir={quoted(run.folder / 'hydra')}")
    return line


def goes_on(run: Run, line: list[str]) -> bool:
    """Whether a run that is started by this command goes on at its last checkpoint; else it starts anew."""
    try:
        told = shlex.split((run.folder / COMMAND_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it was killed while it was being written
        return False
    # One interpreter has several names, and the one that this call was started with changes no run.
    return run.has_checkpoint and told[1:] == line[1:]


def start(run: Run, driver: str) -> subprocess.Popen:
    """Start a run in its folder: at its last checkpoint if it was killed, else anew. It prints to `log.txt`."""
    line = command(run, driver)
    if not goes_on(run, line):
        shutil.rmtree(run.folder, ignore_errors=True)
        run.folder.mkdir(parents=True)
    (run.folder / COMMAND_FILE).write_text(shlex.join(line) + "\n", encoding="utf-8")
    environ = {**os.environ, "VERL_FILE_LOGGER_PATH": str(run.metrics)}
    with (run.folder / "log.txt").open("a", encoding="utf-8") as log:
        return subprocess.Popen(line, env=environ, stdout=log, stderr=subprocess.STDOUT)


def _starter(study: Study, address: str | None) -> Callable[[Run], Any]:
    """Return what starts a run: as a process on this machine, or as a task of a Ray cluster."""
    if address is None:
        return lambda run: start(run, study.driver)
    if study.driver == "main_ppo":
        raise refuse(
            "--ray",
            address,
            "runs of main_ppo use a cluster themselves (not with hardware=cpu); set RAY_ADDRESS instead.",
        )
    import ray

    from recipe.soup.tools.compare.on_ray import RayRun

    try:
        ray.init(address, log_to_driver=False)
    except (ConnectionError, ValueError) as error:
        raise refuse("--ray", address, f"{' '.join(str(error).split())} Leave --ray out to use this machine.") from None
    return lambda run: RayRun(partial(start, run, study.driver))


def _reason(run: Run, process: Any) -> str:
    log = run.folder / "log.txt"
    if not log.exists():  # it never came so far: the node lacks this folder, or was lost
        return str(getattr(process, "error", None) or f"it left nothing in {run.folder}")
    lines = [
        line
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip() and HYDRAS_ADVICE not in line
    ]
    return f"{' '.join(lines[-1:])} (see {log})"


def _end(running: list[tuple[Run, Any]], tell: Callable[[str], None]) -> None:
    """Ask runs to end, wait for no longer than they may take, and kill those that take longer."""
    for run, process in running:
        process.terminate()
        if run.grace > 0:
            may = f"it may take {run.grace:g} s to save a checkpoint (algorithm.soup.sigterm_grace)"
            tell(f"{run.name} seed {run.seed} is asked to end: {may}.")
    asked = time.monotonic()
    for run, process in running:
        deadline = asked + run.grace + LEAVING_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        if process.poll() is None:
            process.kill()
            within = f"{run.grace + LEAVING_SECONDS:g} s after it was asked to"
            tell(
                f"{run.name} seed {run.seed} had not ended {within}, and was killed; it goes on at its last checkpoint."
            )
        process.wait()


def execute(
    study: Study,
    out: Path,
    jobs: int,
    ray_address: str | None = None,
    records: Path | None = None,
    minutes: float | None = None,
) -> list[Run]:
    """Run what is not done yet, several runs at a time; returns those that failed.

    Args:
        out: the study's folder; a study that was killed goes on there.
        jobs: number of runs at a time; 1 on the real path.
        ray_address: address of a cluster that runs the lab's runs, a core each; None: this machine.
        records: folder of finished runs, which are not run again; each run that ends well is added.
        minutes: for all runs together; None: until all are done.

    Raises:
        SystemExit: `jobs`, `minutes` or the cluster cannot be used; a finished run with other settings is in the way.
    """
    if jobs > 1 and study.driver == "main_ppo":
        # A cluster has one TransferQueue of verl: two runs would train on each other's samples.
        raise refuse("--jobs", jobs, "on the real path each run takes the whole machine or Ray cluster; use 1.")
    if jobs < 1:
        raise refuse("--jobs", jobs, "at least one run must run; use 1 or more.")
    limit = TimeLimit(minutes, max(run.grace for run in study.in_folder(out)))
    make_folder("--out", out)
    for run in study.in_folder(out):
        if run.was_another:
            raise refuse("--out", out, f"{run.folder} has a run with other settings; move it away, or give another.")
        if records is not None and run.elsewhere(records).was_another:
            raise refuse(
                "--records", records, f"{run.name} seed {run.seed} was kept with other settings; move it away."
            )
    if records is not None:
        for run in study.in_folder(out):
            if run.is_done and not is_recorded(run, records):  # by an earlier call that kept no records
                write_record(run, read_run(run), records)
    launch = _starter(study, ray_address)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no run outlives this process
    waiting = [run for run in study.in_folder(out) if not (run.is_done or is_recorded(run, records))]
    total = len(study.in_folder(out))
    running: list[tuple[Run, Any]] = []
    failed: list[Run] = []
    with tqdm(total=total, initial=total - len(waiting), unit="run", desc=out.name) as progress:
        try:
            while waiting or running:
                while waiting and len(running) < jobs and limit.allows_another:
                    run = waiting.pop(0)
                    running.append((run, launch(run)))
                    limit.started(run.folder)
                if not running or limit.is_over:
                    break
                progress.set_postfix_str(", ".join(f"{run.name} seed {run.seed}" for run, _ in running[:SHOWN]))
                time.sleep(POLL_SECONDS)
                for item in [item for item in running if item[1].poll() is not None]:
                    run, process = item
                    running.remove(item)
                    if process.wait() == 0 and run.metrics.exists():
                        if records is not None:  # first, so that a run that is done is recorded as well
                            write_record(run, read_run(run), records)
                        run.mark_done()
                        limit.ended(run.folder)
                    else:
                        failed.append(run)
                        progress.write(f"{run.name} seed {run.seed} failed: {_reason(run, process)}")
                    progress.update()
        finally:
            _end(running, progress.write)
    return failed
