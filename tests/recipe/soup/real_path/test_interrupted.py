"""Weights that change in the middle of a response."""

from dataclasses import replace
from pathlib import Path

import pytest
from real_run import EXACT, STARTED, RealRun, assert_exact, assert_goes_on

from recipe.soup.tools.verify import read_samples, verify

pytestmark = pytest.mark.real_run

PARITY = Path(__file__).parents[3] / "support" / "parity_reward.py"


COARSE = replace(EXACT, largest=2 * EXACT.largest)
"""Behind the end of a text, log-probs are so large that float32 rounds them more coarsely."""
LONG = (
    "algorithm=soup",
    "trainer.v1.trainer_mode=soup_colocate_async",
    "algorithm.soup.lag=2",
    "algorithm.soup.warm_start=pure",
    "actor_rollout_ref.rollout.max_num_seqs=8",
    "actor_rollout_ref.rollout.ignore_eos=true",
    "data.max_response_length=40",
    "trainer.total_training_steps=12",
    f"reward.custom_reward_function.path={PARITY}",
)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, clean_environ: dict[str, str]) -> RealRun:
    """verl's trainer with partial rollouts; the engine is narrow, so that a quick machine interrupts some as well."""
    run = RealRun(tmp_path_factory.mktemp("interrupted"), clean_environ, *LONG)
    assert run.finish(STARTED) == 0, run.log[-4000:]
    return run


def test_interrupted_responses_enter_with_the_log_prob_of_each_tokens_own_version(
    interrupted: RealRun, countdown_dir: Path
) -> None:
    samples = read_samples(interrupted.samples)
    # Samples 4 to 7 of a prompt never have a historical prefix: what changed their version was a weight sync.
    pure = [row for rows in samples.values() for row in rows if int(row["uid"].rsplit("_", 2)[1]) >= 4]
    assert any(len(set(row["policy_versions"])) > 1 for row in pure)
    assert all(row["policy_versions"] == sorted(row["policy_versions"]) for row in pure)
    assert_exact(verify(interrupted.samples, interrupted.checkpoints, str(countdown_dir / "base_model")), COARSE)


@pytest.mark.real_more
def test_a_resumed_run_goes_on_with_what_was_under_way(
    interrupted: RealRun, tmp_path: Path, clean_environ: dict[str, str], countdown_dir: Path
) -> None:
    interrupted.copy_checkpoints(tmp_path, up_to=8)
    run = RealRun(tmp_path, clean_environ, *LONG, "trainer.resume_mode=auto")
    assert run.finish(STARTED) == 0, run.log[-4000:]
    assert_exact(verify(run.samples, run.checkpoints, str(countdown_dir / "base_model")), COARSE)
    assert_goes_on(read_samples(interrupted.samples), read_samples(run.samples), lag=2)
