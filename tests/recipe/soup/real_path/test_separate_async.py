"""Trainer and rollout apart: several updates to a weight sync, samples that are under way meanwhile, and a resume."""

from pathlib import Path

import pytest
from real_run import STARTED, RealRun, assert_exact, assert_goes_on

from recipe.soup.tools.verify import read_samples, verify

pytestmark = pytest.mark.real_more

APART = (
    "algorithm=soup",
    "trainer.v1.trainer_mode=soup_separate_async",
    "trainer.v1.separate_async.parameter_sync_step=2",
    "trainer.v1.separate_async.num_warmup_batches=0.5",  # the first update's samples are a sync old, the second's not
    "actor_rollout_ref.hybrid_engine=false",
    "actor_rollout_ref.rollout.nnodes=1",
    "algorithm.soup.lag=2",
    "algorithm.soup.warm_start=pure",
    "trainer.total_training_steps=6",
)


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory, clean_environ: dict[str, str]) -> RealRun:
    run = RealRun(tmp_path_factory.mktemp("apart"), clean_environ, *APART)
    assert run.finish(STARTED) == 0, run.log[-4000:]
    return run


def test_all_updates_of_a_step_have_the_old_log_probs_of_its_start(apart: RealRun, countdown_dir: Path) -> None:
    """And history those of its own version. verl's own copy of the weights would move with each update."""
    assert_exact(verify(apart.samples, apart.checkpoints, str(countdown_dir / "base_model")))
    for step, rows in read_samples(apart.samples).items():
        assert len(rows) == 64
        assert max(version for row in rows for version in row["policy_versions"]) == step - 1


def test_metrics_are_of_both_updates(apart: RealRun) -> None:
    for step, rows in read_samples(apart.samples).items():
        metrics = apart.metrics("soup")[step]
        prefix = sum(row["prefix_length"] for row in rows)
        ages = [step - 1 - version for row in rows for version in row["policy_versions"]]
        assert metrics["soup/train/prefix/tokens"] == prefix
        assert metrics["soup/loss/prefix/tokens"] == pytest.approx(prefix / 2)
        assert metrics["soup/train/samples/trained"] == 64
        assert metrics["soup/train/staleness/mean"] == pytest.approx(sum(ages) / len(ages))
        assert metrics["soup/train/staleness/max"] == max(ages)
        gap = metrics["soup/train/reward/mixed"] - metrics["soup/train/reward/pure"]
        assert metrics["soup/train/reward/mixed_minus_pure"] == pytest.approx(gap if prefix else 0)


def test_a_resumed_run_goes_on_with_what_was_under_way(
    apart: RealRun, tmp_path: Path, clean_environ: dict[str, str], countdown_dir: Path
) -> None:
    apart.copy_checkpoints(tmp_path, up_to=3)
    run = RealRun(tmp_path, clean_environ, *APART, "trainer.resume_mode=auto")
    assert run.finish(STARTED) == 0, run.log[-4000:]
    assert_exact(verify(run.samples, run.checkpoints, str(countdown_dir / "base_model")))
    assert_goes_on(read_samples(apart.samples), read_samples(run.samples), lag=2)
