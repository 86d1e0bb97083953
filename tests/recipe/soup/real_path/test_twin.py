"""The twin: GRPO in our trainer's clothes, and what a user sees of a run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from real_run import EXACT, STARTED, RealRun, assert_engine_agrees, assert_exact

from recipe.soup.tools.verify import verify

pytestmark = pytest.mark.real_run


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory, clean_environ: dict[str, str]) -> RealRun:
    overrides = ["trainer.total_training_steps=3", "trainer.test_freq=3", "trainer.validation_data_dir=validation"]
    run = RealRun(tmp_path_factory.mktemp("twin"), clean_environ, "algorithm=grpo", *overrides)
    assert run.finish(STARTED) == 0, run.log[-4000:]
    return run


def test_the_twin_is_grpo(twin: RealRun, countdown_dir: Path) -> None:
    comparison = verify(twin.samples, twin.checkpoints, str(countdown_dir / "base_model"))
    assert comparison["prefix"].claimed == []
    assert_exact(comparison, replace(EXACT, expected=("continuation",)))
    assert all(metrics["soup/cost/seed_requests"] == 0 for metrics in twin.metrics("grpo").values())


def test_the_terminal_shows_progress_and_the_result(twin: RealRun) -> None:
    for words in (
        "vLLM starts",
        "step 3/3: reward",
        "grpo.jsonl: 3 steps",
        "validation, never mixed",
        "in checkpoints",
    ):
        assert words in twin.terminal
    assert "step:3 - " not in twin.terminal
    assert "step:3 - " in (twin.folder / "log.txt").read_text()
    assert (twin.folder / "runs/countdown/grpo.png").stat().st_size > 10000


def test_engine_and_trainer_agree(twin: RealRun) -> None:
    metrics = twin.metrics("grpo").values()
    assert len(metrics) == 3
    assert_engine_agrees(metrics, "train/continuation")


def test_validation_is_reported_and_dumped(twin: RealRun) -> None:
    assert "val-core/countdown/acc/mean@16" in twin.metrics("grpo")[3]
    rows = [json.loads(line) for line in (twin.folder / "validation" / "3.jsonl").read_text().splitlines()]
    assert len(rows) == 32 * 16
