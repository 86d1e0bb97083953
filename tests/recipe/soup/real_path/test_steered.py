"""Steered prefixes on the real path, with groups that verl filters out, and a run that goes on from a checkpoint."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from real_run import STARTED, RealRun, assert_exact

from recipe.soup.prefixes.steering import STEERING_FILE
from recipe.soup.tools.verify import read_samples, verify

pytestmark = pytest.mark.real_more

STEERED = (
    "algorithm=soup",
    "algorithm.soup.source=replay",
    "algorithm.soup.selection=steered",
    "algorithm.soup.steering.cut=entropy",
    "data.train_max_samples=16",
    "data.shuffle=false",
    "trainer.total_epochs=100",
)


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory, clean_environ: dict[str, str]) -> RealRun:
    """16 prompts, eight a step: they come again every second step."""
    run = RealRun(tmp_path_factory.mktemp("steered"), clean_environ, *STEERED, "trainer.total_training_steps=8")
    assert run.finish(STARTED) == 0, run.log[-4000:]
    return run


def test_every_ratio_is_exact(steered: RealRun, countdown_dir: Path) -> None:
    assert_exact(verify(steered.samples, steered.checkpoints, str(countdown_dir / "base_model")))


def test_a_prefix_is_the_beginning_of_a_response_with_one_outcome(steered: RealRun) -> None:
    """Of a success where a prompt gets help, of a failure where it is too easy; all of a visit's are of one kind."""
    earlier: dict[Any, list[tuple[list[int], bool]]] = defaultdict(list)
    seen = 0
    for step, rows in sorted(read_samples(steered.samples).items()):
        outcomes: dict[Any, list[set[bool]]] = defaultdict(list)
        for row in rows:
            prompt, prefix = tuple(row["prompt_ids"]), row["response_ids"][: row["prefix_length"]]
            if prefix:
                assert len(prefix) < len(row["response_ids"])
                outcomes[prompt].append({won for ids, won in earlier[prompt] if ids[: len(prefix)] == prefix})
        for found in outcomes.values():
            seen += len(found)
            assert set.intersection(*found), f"step {step}"
        for row in rows:
            earlier[tuple(row["prompt_ids"])].append((row["response_ids"], row["score"] > 0))
    assert seen > 20


def test_controllers_move_and_are_in_the_checkpoint(steered: RealRun) -> None:
    metrics = steered.metrics("soup")
    assert metrics[1]["soup/train/mixed/samples"] == 0
    assert metrics[8]["soup/train/mixed/samples"] > 0
    assert metrics[8]["soup/steering/prompts"] == 16
    assert 0 < metrics[8]["soup/steering/solved"] < 1
    assert (steered.checkpoints / "global_step_8" / STEERING_FILE).exists()


def test_a_run_that_filters_goes_on_with_controllers_of_groups_that_it_never_trained_on(
    steered: RealRun, tmp_path: Path, clean_environ: dict[str, str], countdown_dir: Path
) -> None:
    steered.copy_checkpoints(tmp_path, up_to=4)
    filters = ("algorithm.filter_groups.enable=true", "algorithm.filter_groups.metric=reward", "data.gen_batch_size=1")
    steps = ("trainer.total_training_steps=6", "trainer.resume_mode=auto")
    run = RealRun(tmp_path, clean_environ, *STEERED, *filters, *steps)
    assert run.finish(STARTED) == 0, run.log[-4000:]
    metrics = run.metrics("soup")
    for step in (5, 6):
        assert metrics[step]["soup/train/groups_with_signal"] == 1
        evicted = metrics[step].get("training/filter_groups/evicted_samples", 0)
        assert (metrics[step]["soup/cost/evicted_tokens"] > 0) >= (evicted > 0)
    assert sum(metrics[step]["soup/cost/evicted_tokens"] for step in (5, 6)) > 0
    assert_exact(verify(run.samples, run.checkpoints, str(countdown_dir / "base_model")))
