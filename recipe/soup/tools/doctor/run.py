"""`soup-verl doctor`: would this command run on this machine? Starts nothing."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recipe.soup.checks.start import AT_START
from recipe.soup.errors import first_line
from recipe.soup.tools.doctor import disk, environment, machine
from recipe.soup.tools.doctor.machine import CannotTell
from recipe.soup.tools.doctor.trials import Trials
from recipe.soup.verl_adapter.compose import composed
from recipe.soup.verl_adapter.trial import verls_own_checks

EXAMPLES = """examples:
  soup-verl doctor algorithm=soup hardware=cpu example=countdown
  soup-verl doctor algorithm=soup actor_rollout_ref.model.path=Qwen/Qwen3-1.7B \\
      data.train_files=data/train.parquet data.val_files=data/val.parquet trainer.n_gpus_per_node=1
"""
OK, PROBLEM, UNKNOWN = "ok", "problem", "cannot tell"
BESIDE = ("start", "console", "result", "last_words")
"""Callbacks that are not asked: the first line by line, the others refuse nothing."""
INSTEAD = ("CPUs and GPUs",)
"""Checks of a start of which `machine` has one that asks a Ray cluster, too."""

Line = tuple[str, str, str]
"""Mark, subject, words."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `soup-verl doctor`."""
    parser.add_argument("overrides", nargs="*", help="as for python -m verl.trainer.main_ppo")


def doctor(args: argparse.Namespace) -> None:
    """Say what would keep a command of verl from running here, a line each; 1 is the exit code if something would.

    Give what comes after `python -m verl.trainer.main_ppo`, on the machine that is to run it.
    """
    problems = 0
    for mark, subject, words in examine(args.overrides):
        problems += mark == PROBLEM
        print(f"{mark:<11}  {subject}: {words}", flush=True)
    if problems:
        print("\n1 problem." if problems == 1 else f"\n{problems} problems.")
        sys.exit(1)


def examine(overrides: list[str]) -> Iterator[Line]:
    """Yield a line for each thing that was looked at."""
    try:
        whole = composed(overrides, with_hydra=True)
        config = OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"])
        OmegaConf.resolve(OmegaConf.create(OmegaConf.to_container(config)))
    except SystemExit as refusal:
        yield PROBLEM, "config", str(refusal.code)
        return
    except OmegaConfBaseException as error:
        yield PROBLEM, "config", " ".join(str(error).split())
        return
    subjects: dict[str, Callable[[DictConfig], str | None]] = {
        "versions": environment.check_versions,
        "plugin": environment.check_plugin,
        **{name: check for name, check in AT_START.items() if name not in INSTEAD},
        **{name: _asked(settings) for name, settings in whole.hydra.callbacks.items() if name not in BESIDE},
        "verl's own checks": verls_own_checks,
        "CPUs and GPUs": machine.check_resources,
        "GPU memory": machine.check_gpu_memory,
        "shared memory": machine.check_shared_memory,
        "memory": machine.check_memory,
        "disk": disk.check_disk,
        **Trials().all(),
    }
    said: dict[str, str] = {}
    for subject, check in subjects.items():
        mark, subject, words = _line(subject, check, config)
        if mark == PROBLEM and words in said:  # one problem, however many look at it
            mark, words = UNKNOWN, f"see {said[words]}, above."
        elif mark == PROBLEM:
            said[words] = subject
        yield mark, subject, words


def _line(subject: str, check: Callable[[DictConfig], str | None], config: DictConfig) -> Line:
    try:
        return OK, subject, check(config) or "in order"
    except SystemExit as refusal:
        return PROBLEM, subject, str(refusal.code)
    except CannotTell as unknown:
        return UNKNOWN, subject, f"{unknown}."
    except Exception as error:  # after an earlier problem a later check may find no ground
        return UNKNOWN, subject, f"{type(error).__name__}: {first_line(error)}."


def _asked(settings: DictConfig) -> Callable[[DictConfig], str | None]:
    """Make a check of one of the callbacks that run before verl's main function; what it prints are its words."""

    def check(config: DictConfig) -> str | None:
        said = StringIO()
        with redirect_stdout(said), redirect_stderr(said):
            instantiate(settings).on_job_start(config)
        return " ".join(said.getvalue().split()) or None

    return check
