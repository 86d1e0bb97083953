"""Prefixes of earlier visits."""

from pathlib import Path

import pytest
from real_run import STARTED, RealRun, assert_exact, versions_of_prefixes

from recipe.soup.tools.verify import read_samples, verify

pytestmark = pytest.mark.real_run


@pytest.fixture(scope="module")
def replay(tmp_path_factory: pytest.TempPathFactory, clean_environ: dict[str, str]) -> RealRun:
    """24 prompts, eight a step: they come again every third step. Not with the default ratio, and with a KL loss."""
    overrides = ["algorithm.soup.source=replay", "algorithm.soup.mixed_share=0.75", "data.train_max_samples=24"]
    overrides += ["trainer.total_epochs=100", "trainer.total_training_steps=9", "algorithm.soup.prefix_length.max=16"]
    overrides += ["algorithm.soup.ratio=shaped", "algorithm.soup.behavior_log_probs=trainer"]
    overrides += ["actor_rollout_ref.actor.use_kl_loss=true"]
    run = RealRun(tmp_path_factory.mktemp("replay"), clean_environ, "algorithm=soup", *overrides)
    assert run.finish(STARTED) == 0, run.log[-4000:]
    return run


def test_replayed_tokens_keep_the_version_that_sampled_them(replay: RealRun, countdown_dir: Path) -> None:
    assert_exact(verify(replay.samples, replay.checkpoints, str(countdown_dir / "base_model")))
    samples = read_samples(replay.samples)
    assert all(versions_of_prefixes(samples[step]) == set() for step in (1, 2, 3))
    assert all(sum(row["prefix_length"] > 0 for row in samples[step]) == 48 for step in range(4, 10))
    several = [row for row in samples[9] if len(set(row["policy_versions"][: row["prefix_length"]])) > 1]
    assert several  # began at one visit, went on at the next, and is replayed at the third


def test_a_replayed_prefix_is_one_that_its_prompt_left_at_its_last_visit(replay: RealRun) -> None:
    samples = read_samples(replay.samples)
    for step in range(4, 10):
        for row in samples[step]:
            prefix = row["response_ids"][: row["prefix_length"]]
            earlier = [
                r for s in range(max(step - 5, 1), step) for r in samples[s] if r["prompt_ids"] == row["prompt_ids"]
            ]
            assert any(r["response_ids"][: len(prefix)] == prefix for r in earlier)


def test_a_shaped_ratio_has_no_clip_on_the_prefix_and_gradients_flow(replay: RealRun) -> None:
    for step, metrics in replay.metrics("soup").items():
        assert metrics["actor/grad_norm"] > 0
        assert (metrics["soup/loss/prefix/tokens"] > 0) == (step > 3)
        clips = [metrics[f"soup/loss/prefix/clip_fraction/{side}"] for side in ("low", "high", "dual")]
        assert clips == [0, 0, 0]
        assert metrics["soup/train/lag_2_to_3/tokens"] > 0 or step <= 3


def test_the_kl_loss_grows_from_zero_as_the_policy_leaves_its_reference(replay: RealRun) -> None:
    losses = [metrics["actor/kl_loss"] for metrics in replay.metrics("soup").values()]
    assert 0 < losses[0] < losses[-1]
