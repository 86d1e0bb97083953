"""The study of SmolLM2 (examples/smollm2/studies/): each row is accepted, and trains two steps on a stand-in."""

from pathlib import Path
from typing import Any

import pytest

from recipe.soup.checks.config import check_config
from recipe.soup.checks.start import IN_ANY_DRIVER
from recipe.soup.lab import hardware
from recipe.soup.lab.driver import Lab
from recipe.soup.tools.compare.study import read_study

STUDY = read_study(Path(__file__).parents[2] / "examples/smollm2/studies/arithmetic.yaml")
ROWS = {run.name: run for run in STUDY.in_folder(Path("runs/study")) if run.seed == 0}


def stand_in(countdown: Path) -> list[str]:
    """Another model and task, and as little of both as will do; all that makes the rows differ stays."""
    return [
        f"actor_rollout_ref.model.path={countdown}/base_model",
        f"data.train_files={countdown}/data/train.parquet",
        f"data.val_files={countdown}/data/val.parquet",
        "reward.custom_reward_function.path=pkg://examples.countdown.reward",
        "data.train_batch_size=4",
        "data.train_max_samples=4",  # each step sees the same prompts, so that the second has earlier responses
        "trainer.total_epochs=150",
        "data.val_max_samples=2",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    ]


@pytest.mark.parametrize("row", ROWS)
def test_each_row_trains(row: str, composed: Any, countdown_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "TOYS_VOCABULARY", 0)
    config = composed(*ROWS[row].overrides, *stand_in(countdown_dir))
    for check in IN_ANY_DRIVER.values():
        check(config)
    check_config(config)
    lab = Lab(config)
    assert lab.last_step == 150
    for step in (1, 2):
        metrics = lab.step(step)
        assert metrics["actor/grad_norm"] > 0
    assert any(key.endswith("pass@16") for key in lab.validation(lab.model, 2))
    # Prefixes of the policy before, but for the twins.
    assert (metrics["soup/train/mixed/share"] > 0) == (config.algorithm.soup.mixed_share > 0)
    assert ("training/filter_groups/evicted_samples" in metrics) <= row.startswith("filter")


def test_rows_differ_in_what_they_are_named_for(composed: Any) -> None:
    configs = {row: composed(*run.overrides) for row, run in ROWS.items()}
    rates = {row: config.actor_rollout_ref.actor.optim.lr for row, config in configs.items()}
    assert rates == {row: 3e-5 if row == "grpo_3e-5" else 1e-5 for row in ROWS}
    assert [configs[f"soup_lag_{lag}"].algorithm.soup.lag for lag in (16, 64)] == [16, 64]
    assert [row for row, config in configs.items() if config.algorithm.filter_groups.enable] == ["filter_1e-5"]
    selections = {row: config.algorithm.soup.get("selection") for row, config in configs.items()}
    assert [row for row, selection in selections.items() if selection == "steered"] == ["steered_1e-5"]
    samples = [config.actor_rollout_ref.rollout.val_kwargs.n for config in configs.values()]
    assert samples == [16] * len(ROWS)  # pass@16
    assert len(STUDY.seeds) == 3
    assert STUDY.baseline == "grpo_1e-5"
