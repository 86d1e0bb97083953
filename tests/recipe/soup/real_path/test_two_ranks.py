"""Two FSDP ranks over gloo, two vLLM replicas, two agent-loop workers: one run, and its resume."""

from pathlib import Path

import pytest
from real_run import STARTED, RealRun, assert_exact, versions_of_prefixes

from recipe.soup.tools.verify import read_samples, verify

pytestmark = pytest.mark.real_more

TWO = (
    "algorithm=soup",
    "algorithm.soup.lag=2",
    "algorithm.soup.warm_start=pure",
    "trainer.n_gpus_per_node=2",
    "actor_rollout_ref.rollout.agent.num_workers=2",
    "trainer.total_training_steps=6",
)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, clean_environ: dict[str, str]) -> RealRun:
    run = RealRun(tmp_path_factory.mktemp("two"), clean_environ, *TWO)
    assert run.finish(STARTED) == 0, run.log[-4000:]
    return run


def test_every_token_has_the_log_prob_of_its_own_version(two: RealRun, countdown_dir: Path) -> None:
    assert_exact(verify(two.samples, two.checkpoints, str(countdown_dir / "base_model")))
    for step, rows in read_samples(two.samples).items():
        assert versions_of_prefixes(rows) == ({step - 3} if step >= 3 else set())


def test_metrics_count_the_tokens_of_both_ranks(two: RealRun) -> None:
    """A step has two mini-batches; each metric of the loss is over all of a mini-batch, wherever it was computed."""
    for step, rows in read_samples(two.samples).items():
        metrics = two.metrics("soup")[step]
        prefix = sum(row["prefix_length"] for row in rows)
        tokens = sum(len(row["response_ids"]) for row in rows)
        assert metrics["soup/train/prefix/tokens"] == prefix
        assert metrics["soup/loss/prefix/tokens"] == pytest.approx(prefix / 2)
        assert metrics["soup/loss/continuation/tokens"] == pytest.approx((tokens - prefix) / 2)


def test_a_resumed_run_goes_on_with_its_prefixes(
    two: RealRun, tmp_path: Path, clean_environ: dict[str, str], countdown_dir: Path
) -> None:
    two.copy_checkpoints(tmp_path, up_to=4)
    run = RealRun(tmp_path, clean_environ, *TWO, "trainer.resume_mode=auto")
    assert run.finish(STARTED) == 0, run.log[-4000:]
    samples = read_samples(run.samples)
    assert {step: versions_of_prefixes(rows) for step, rows in samples.items()} == {5: {2}, 6: {3}}
    assert_exact(verify(run.samples, run.checkpoints, str(countdown_dir / "base_model")))
