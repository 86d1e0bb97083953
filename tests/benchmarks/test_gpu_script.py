"""`benchmarks/gpu.sh`: verl and SOUP accept what it starts, up to the point at which a GPU is needed."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from benchmarks.gpu_checks import CHECKS, MARK
from examples.smollm2.build_data import build

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("lookahead", "replay", "snapshot")
ALL = [
    *(("exact", source) for source in SOURCES),
    *(("cost", source) for source in SOURCES),
    *(("log-probs", whose) for whose in ("rollout", "trainer")),
    *((check, algorithm) for check in ("learn", "lab") for algorithm in ("soup", "grpo")),
]
Compose = Callable[..., DictConfig]
Calls = Callable[..., list[list[str]]]

every_check = pytest.mark.parametrize("check", ALL, ids="-".join)


@pytest.fixture
def calls(tmp_path: Path, countdown_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Run the script with a `python` that notes its arguments and does nothing; returns those of each call."""
    noted, python = tmp_path / "calls", tmp_path / "python"
    python.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" END >> {noted}\n')
    python.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SMOLLM2", str(countdown_dir / "base_model"))

    def run(*arguments: str) -> list[list[str]]:
        noted.unlink(missing_ok=True)
        done = subprocess.run([ROOT / "benchmarks" / "gpu.sh", *arguments], capture_output=True, text=True, check=True)
        assert arguments[0] == "all" or done.stdout == f"{MARK}\n"
        return [call.splitlines() for call in noted.read_text().split("END\n")[:-1]]

    return run


def the_run(calls: list[list[str]]) -> list[str]:
    """The overrides of the one call that trains."""
    starts = ("verl.trainer.main_ppo", "benchmarks.step_cost", "benchmarks.lab_step")
    [call] = [call for call in calls if call[1] in starts]
    if call[1] == "benchmarks.lab_step":
        from benchmarks.lab_step import OVERRIDES

        call = [*call[:2], *OVERRIDES, *call[2:]]
    group = [f"algorithm.soup.source={call[2]}", "algorithm=soup"] if call[1] == "benchmarks.step_cost" else []
    # The fixture composes no keys of Hydra's own: those say where the log goes.
    return group + [argument for argument in call if "=" in argument and not argument.startswith(("--", "hydra."))]


@every_check
def test_verl_and_soup_accept_it(
    check: tuple[str, str], calls: Calls, composed: Compose, countdown_dir: Path, tmp_path: Path
) -> None:
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    from recipe.soup.checks.config import check_config
    from recipe.soup.lab.refusals import check_lab_config

    build(tmp_path, 8, 4, 0)
    files = [f"data.train_files={tmp_path}/train.parquet", f"data.val_files={tmp_path}/val.parquet"]
    overrides = the_run(calls(*check))
    config = composed(*overrides, f"actor_rollout_ref.model.path={countdown_dir}/base_model", *files)
    validate_config(config, need_reference_policy(config), need_critic(config))
    check_config(config)
    policy, data = config.actor_rollout_ref, config.data
    omega_conf_to_dataclass(policy.rollout)
    if check[0] == "lab":  # which has one of them, whatever these keys say
        check_lab_config(config)
    else:
        assert config.trainer.n_gpus_per_node * config.trainer.nnodes == policy.rollout.tensor_model_parallel_size == 1
    assert data.train_batch_size % policy.actor.ppo_mini_batch_size == 0
    longest = data.max_prompt_length + data.max_response_length
    assert longest <= policy.rollout.max_model_len
    assert longest <= policy.actor.ppo_max_token_len_per_gpu
    # Groups with rewards that differ: from a task that this model solves now and then, or by a hash.
    assert policy.rollout.n >= 8
    reward = "benchmarks.hash_reward" if check[0] == "cost" else "examples.smollm2.reward"
    assert config.reward.custom_reward_function.path == f"pkg://{reward}"
    assert (policy.rollout.dtype == "float32") == (check[0] == "exact")


@pytest.mark.parametrize("source", SOURCES)
def test_exact_is_judged_with_bounds_and_other_versions_apart(source: str, calls: Calls) -> None:
    called = calls("exact", source)
    assert "precision=fp32" in the_run(called)
    verify = called[-1]
    assert verify[1] == "recipe.soup.verify"
    assert verify[-6:] == ["--mean", "2e-5", "--largest", "2e-4", "--apart", "1e-2"]


@every_check
def test_the_users_overrides_come_last(check: tuple[str, str], calls: Calls) -> None:
    assert the_run(calls(*check, "hardware=cpu", "algorithm.soup.lag=3"))[-2:] == [
        "hardware=cpu",
        "algorithm.soup.lag=3",
    ]


def test_all_hands_everything_on(calls: Calls) -> None:
    assert calls("all", "--seconds", "540", "hardware=cpu") == [
        ["-m", "benchmarks.gpu_checks", "--seconds", "540", "hardware=cpu"]
    ]


def test_all_knows_only_checks_that_the_script_has() -> None:
    assert {check.arguments for check in CHECKS} <= set(ALL)


@pytest.mark.parametrize("arguments", [[], ["exact"], ["exact", "nothing"], ["learn", "lookahead"], ["x", "soup"]])
def test_without_a_check_it_says_how_it_is_used(arguments: list[str]) -> None:
    run = subprocess.run([ROOT / "benchmarks" / "gpu.sh", *arguments], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith("Say what to do: ")


def test_the_figures_are_metrics_that_runs_have(calls: Calls) -> None:
    from recipe.soup.algorithm.batch import TrainRows
    from recipe.soup.algorithm.batch_metrics import train_metrics
    from recipe.soup.algorithm.loss_metrics import MEANS, PREFIX, SEGMENTS

    empty = torch.zeros(0, 4)
    rows = TrainRows(empty.bool(), empty.long(), empty.bool(), empty.long(), empty, empty, empty, torch.zeros(0), [], 0)
    figures = (*MEANS, "effective_sample_size")
    known = train_metrics(rows).keys() | {f"{PREFIX}{segment}/{name}" for segment in SEGMENTS for name in figures}
    for check in (("log-probs", "rollout"), ("learn", "soup")):
        columns = [argument.split("=")[1] for argument in calls(*check)[-1][5:]]
        ours = [key for key in columns if key.startswith("soup/")]
        assert ours
        assert set(ours) <= known
