"""Weights that change in the middle of a response."""

from dataclasses import replace
from pathlib import Path

import pytest
from real_run import EXACT, STARTED, RealRun, assert_exact

from recipe.soup.tools.verify import read_samples, verify

pytestmark = pytest.mark.real_run

PARITY = Path(__file__).parents[3] / "support" / "parity_reward.py"


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, clean_environ: dict[str, str]) -> RealRun:
    """verl's trainer with partial rollouts; the engine is narrow, so that a quick machine interrupts some as well."""
    overrides = [
        "trainer.v1.trainer_mode=soup_colocate_async",
        "algorithm.soup.lag=2",
        "algorithm.soup.warm_start=pure",
    ]
    overrides += ["actor_rollout_ref.rollout.max_num_seqs=8", "actor_rollout_ref.rollout.ignore_eos=true"]
    overrides += ["data.max_response_length=40", "trainer.total_training_steps=12"]
    overrides += [f"reward.custom_reward_function.path={PARITY}"]
    run = RealRun(tmp_path_factory.mktemp("interrupted"), clean_environ, "algorithm=soup", *overrides)
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
    # Behind the end of a text, log-probs are so large that float32 rounds them more coarsely.
    bounds = replace(EXACT, largest=2 * EXACT.largest)
    assert_exact(verify(interrupted.samples, interrupted.checkpoints, str(countdown_dir / "base_model")), bounds)
