"""The scripts per model size: twins differ in the algorithm only, and the user's keys win.

That verl and SOUP accept what they start is in `test_gpu_commands.py`.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from verl_ext.terminal.console import QuietConsole

Compose = Callable[..., DictConfig]
Start = Callable[..., list[str]]

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "examples").glob("run_*.sh"))
every_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


def leaves(node: object, path: str = "") -> dict[str, object]:
    """Every key that holds a value, with dots; interpolations stay as they are written."""
    if isinstance(node, DictConfig):
        node = OmegaConf.to_container(node)
    if not isinstance(node, dict):
        return {path: node}
    return {key: value for name, child in node.items() for key, value in leaves(child, f"{path}.{name}").items()}


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Run a script with a `python` that prints its arguments; returns the overrides it was given."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)

    def run(script: Path, *arguments: str) -> list[str]:
        environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MATH_DATA": str(tmp_path)}
        printed = subprocess.run([script, *arguments], env=environ, capture_output=True, text=True, check=True).stdout
        module, overrides = printed.splitlines()[:2], printed.splitlines()[2:]
        assert module == ["-m", "verl.trainer.main_ppo"]
        return overrides

    return run


def test_there_is_one_for_each_size() -> None:
    sizes = ("qwen2.5-math-1.5b", "qwen2.5-math-7b", "qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b")
    assert [script.stem for script in SCRIPTS] == [f"run_{size}" for size in sizes]


@every_script
def test_twins_differ_in_what_the_algorithms_file_sets_only(script: Path, start: Start, composed: Compose) -> None:
    soup, grpo = (leaves(composed(*start(script, algorithm))) for algorithm in ("soup", "grpo"))
    differing = {key for key in soup.keys() | grpo.keys() if soup.get(key, "absent") != grpo.get(key, "absent")}
    group = OmegaConf.load(ROOT / "recipe" / "soup" / "config" / "algorithm" / "soup.yaml")
    assert differing <= leaves(group).keys()
    assert ".algorithm.soup.mixed_share" in differing
    assert ".trainer.experiment_name" in differing


@every_script
def test_plain_verl_gets_what_the_twin_gets(script: Path, start: Start) -> None:
    assert start(script, "verl", "a.b=1") == ["algorithm=verl", *start(script, "grpo", "a.b=1")[1:]]


@every_script
def test_runs_of_two_models_share_no_folder(script: Path, start: Start, composed: Compose) -> None:
    trainer = composed(*start(script, "soup")).trainer
    name = script.stem.removeprefix("run_")
    assert trainer.default_local_dir == f"runs/{name}/soup/checkpoints"
    assert trainer.validation_data_dir == f"runs/{name}/soup/validation"


@every_script
def test_the_users_overrides_win(script: Path, start: Start, composed: Compose) -> None:
    ours = start(script, "soup")
    set_by_script = {override.split("=")[0] for override in ours[2:]}  # the first two choose groups
    users = [f"{key}=7" for key in sorted(set_by_script)] + ["data.train_batch_size=7", "algorithm.soup.lag=7"]
    overrides = start(script, "soup", *users, "trainer.logger=[console, wandb]")
    assert overrides == [*ours, *users, "trainer.logger=[console, wandb]"]
    config = composed(*overrides)
    assert [OmegaConf.select(config, override.split("=")[0]) for override in users] == [7] * len(users)
    assert config.trainer.logger == ["console", "wandb"]


@every_script
@pytest.mark.parametrize("arguments", [[], [""], ["ppo"], ["trainer.nnodes=2", "soup"]])
def test_without_an_algorithm_it_says_how_it_is_used(script: Path, arguments: list[str]) -> None:
    run = subprocess.run([script, *arguments], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.splitlines() == [f"Say which algorithm to train with: {script} soup|grpo|verl [key=value ...]"]


def test_the_groups_file_sets_only_keys_that_exist(composed: Compose) -> None:
    """Hydra refuses unknown keys on the command line, but not in a group's file."""
    known = leaves(composed("algorithm=soup")).keys() | {
        ".ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_ROOT",
        *(f".hydra.callbacks.console.{key}" for key in ("_target_", *signature(QuietConsole).parameters)),
    }
    group = OmegaConf.load(ROOT / "examples" / "math" / "config" / "example" / "math.yaml")
    assert leaves(group).keys() <= known


def test_main_ppo_composes_the_same(
    start: Start, composed: Compose, clean_environ: dict[str, str], tmp_path: Path
) -> None:
    script = SCRIPTS[0]
    environ = {**clean_environ, "MATH_DATA": str(tmp_path)}
    environ["PATH"] = f"{Path(sys.executable).parent}:{environ['PATH']}"
    command = [script, "soup", "trainer.nnodes=2", "--cfg", "job"]
    printed = subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout
    assert OmegaConf.create(printed) == composed(*start(script, "soup", "trainer.nnodes=2"))
