"""The scripts per model size: verl and SOUP accept what they start, and twins differ in the algorithm only."""

import os
import subprocess
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import DictConfig, OmegaConf

from verl_ext.console import QuietConsole

Compose = Callable[..., DictConfig]
Start = Callable[..., list[str]]

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "examples").glob("run_*.sh"))
CONTEXT = {"qwen3": 32768, "qwen2.5-math": 4096}
"""Tokens that the models of a family were trained for."""

every_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
both_twins = pytest.mark.parametrize("algorithm", ["soup", "grpo"])


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


@pytest.fixture
def inputs(tmp_path: Path, countdown_dir: Path) -> list[str]:
    """A model and data on this machine, where the script's defaults are downloads: the data by MATH_DATA."""
    message = {"role": "user", "content": "1+1?"}
    row = {"data_source": "math", "prompt": [message], "reward_model": {"style": "rule", "ground_truth": "2"}}
    for name in ("dapo_math_17k", "math500"):
        pd.DataFrame([row]).to_parquet(tmp_path / f"{name}.parquet")
    return [f"actor_rollout_ref.model.path={countdown_dir}/base_model", f"trainer.default_local_dir={tmp_path}/none"]


def test_there_is_one_for_each_size() -> None:
    sizes = ("qwen2.5-math-1.5b", "qwen2.5-math-7b", "qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b")
    assert [script.stem for script in SCRIPTS] == [f"run_{size}" for size in sizes]


@every_script
@both_twins
def test_verl_and_soup_accept_it(
    script: Path, algorithm: str, start: Start, inputs: list[str], composed: Compose
) -> None:
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    from recipe.soup.refusals import check_config

    config = composed(*start(script, algorithm, *inputs))
    assert config.algorithm.adv_estimator == algorithm
    validate_config(config, need_reference_policy(config), need_critic(config))
    omega_conf_to_dataclass(config.actor_rollout_ref.rollout)  # which verl itself does in its workers
    check_config(config)
    OmegaConf.resolve(config)


@every_script
def test_batches_and_lengths_fit(script: Path, start: Start, composed: Compose) -> None:
    """What verl would only notice in its workers, with dynamic batch sizes; on one node and on two."""
    config = composed(*start(script, "soup"))
    actor, rollout, data = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, config.data
    gpus = config.trainer.n_gpus_per_node * config.trainer.nnodes
    assert gpus % rollout.tensor_model_parallel_size == 0
    assert data.train_batch_size % actor.ppo_mini_batch_size == 0
    assert actor.ppo_mini_batch_size * rollout.n % (2 * gpus) == 0
    longest = data.max_prompt_length + data.max_response_length
    assert longest <= actor.ppo_max_token_len_per_gpu
    assert longest <= next(tokens for family, tokens in CONTEXT.items() if family in script.stem)


@every_script
def test_twins_differ_in_what_the_algorithms_file_sets_only(script: Path, start: Start, composed: Compose) -> None:
    soup, grpo = (leaves(composed(*start(script, algorithm))) for algorithm in ("soup", "grpo"))
    differing = {key for key in soup.keys() | grpo.keys() if soup.get(key, "absent") != grpo.get(key, "absent")}
    group = OmegaConf.load(ROOT / "recipe" / "soup" / "config" / "algorithm" / "soup.yaml")
    assert differing <= leaves(group).keys()
    assert ".algorithm.soup.mixed_share" in differing
    assert ".trainer.experiment_name" in differing


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
    assert run.stderr.splitlines() == [f"Say which algorithm to train with: {script} soup|grpo [key=value ...]"]


def test_the_groups_file_sets_only_keys_that_exist(composed: Compose) -> None:
    """Hydra refuses unknown keys on the command line, but not in a group's file."""
    known = leaves(composed("algorithm=soup")).keys() | {
        ".ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_ROOT",
        *(f".hydra.callbacks.console.{key}" for key in ("_target_", *signature(QuietConsole).parameters)),
    }
    group = OmegaConf.load(ROOT / "examples" / "math" / "config" / "example" / "math.yaml")
    assert leaves(group).keys() <= known


def test_verl_finds_the_reward(composed: Compose) -> None:
    from verl.trainer.ppo.reward import get_custom_reward_fn

    reward = get_custom_reward_fn(composed("algorithm=soup", "example=math"))
    assert reward is not None
    assert reward(data_source="math", solution_str="so \\boxed{2}", ground_truth="2")["score"] == 1.0


def test_main_ppo_composes_the_same(
    start: Start, composed: Compose, clean_environ: dict[str, str], tmp_path: Path
) -> None:
    script = SCRIPTS[0]
    environ = {**clean_environ, "MATH_DATA": str(tmp_path)}
    environ["PATH"] = f"{Path(sys.executable).parent}:{environ['PATH']}"
    command = [script, "soup", "trainer.nnodes=2", "--cfg", "job"]
    printed = subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout
    assert OmegaConf.create(printed) == composed(*start(script, "soup", "trainer.nnodes=2"))
