"""Verified replay in the lab: what is kept counts as the current policy's, and is not sampled again."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recipe.soup.lab.collect import collect
from recipe.soup.lab.driver import Lab
from recipe.soup.lab.forward import of_responses

VERIFIED = (
    "example=countdown",
    "algorithm=soup",
    "algorithm.soup.source=replay",
    "algorithm.soup.selection=verified",
    "algorithm.soup.mixed_share=1",
    "data.train_batch_size=4",
    "data.train_max_samples=8",
    "data.val_max_samples=4",
    "trainer.total_epochs=20",
    "trainer.total_training_steps=12",
    "trainer.logger=[]",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "actor_rollout_ref.actor.optim.lr=1e-3",
)
EXACT = ("algorithm.soup.verification.leniency=1", "algorithm.soup.verification.rejected=residual")


def run(composed: Any, *overrides: str) -> Lab:
    return Lab(composed(*VERIFIED, *overrides))


def generated(lab: Lab, step: int, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, float], int]:
    """The metrics of a step, and how many tokens were sampled in it."""
    sampled: list[int] = []
    sample = lab.rollout.sample

    def counted(*args: Any) -> Any:
        answers = sample(*args)
        sampled.append(sum(len(answer.token_ids) for answer in answers))
        return answers

    with monkeypatch.context() as patched:
        patched.setattr(lab.rollout, "sample", counted)
        return lab.step(step), sum(sampled)


@pytest.mark.parametrize("overrides", [(), ("algorithm.soup.verification.leniency=1",), EXACT])
def test_what_is_accepted_is_not_sampled_again(
    composed: Any, overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = run(composed, *overrides)
    for step in range(1, 7):
        metrics, sampled = generated(lab, step, monkeypatch)
        told = {name.removeprefix("soup/verified/"): v for name, v in metrics.items() if "soup/verified/" in name}
        assert metrics["soup/train/prefix/tokens"] == 0  # nothing is historical
        drawn = metrics["soup/train/continuation/tokens"] - told["accepted"] - sampled
        # A token from the residual is not of the sampler's.
        assert 0 <= drawn <= (told["responses"] - told["whole"]) * bool(overrides == EXACT)
        assert (told["share"], told["responses"]) == ((1, 32) if step > 2 else (0, 0))
        if step > 2:
            assert 0.2 < told["accepted_share"] == told["accepted"] / told["tokens"] < 1
            assert told["seconds"] > 0


@pytest.mark.parametrize("overrides", [(), EXACT])
def test_what_is_accepted_has_the_current_policys_version_and_log_probs(
    composed: Any, overrides: tuple[str, ...]
) -> None:
    lab = run(composed, *overrides)
    for step in range(1, 4):
        lab.step(step)
    groups = collect(4, lab.config, lab.source, lab.rollout, lab.missing)[0].groups
    samples = [sample for group in groups for sample in group.samples]
    with torch.no_grad():
        recomputed = of_responses(lab.updater.forward_all(samples)[0], samples)
    assert all(set(sample.versions) == {3} for sample in samples)
    largest = max(
        np.abs(np.array(sample.log_probs) - values.numpy()).max()
        for sample, values in zip(samples, recomputed, strict=True)
    )
    assert largest < 1e-4


@pytest.mark.parametrize("overrides", [(), EXACT])
def test_a_killed_run_verifies_with_the_same_draws(composed: Any, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    places = (f"trainer.default_local_dir={tmp_path}", "trainer.resume_mode=auto", *overrides)
    whole = run(composed, *places)
    told = [whole.step(step) for step in range(1, 8)]
    stopped = run(composed, *places)
    for step in range(1, 5):
        stopped.step(step)
    stopped._save(4)
    resumed = run(composed, *places)
    for step in range(5, 8):
        metrics, expected = resumed.step(step), told[step - 1]
        assert set(metrics) == set(expected)
        different = {
            name
            for name in metrics
            if metrics[name] != expected[name] and not name.startswith("timing") and not name.endswith("seconds")
        }
        assert not different


def test_groups_that_refill_a_step_are_not_verified(composed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    filters = ("algorithm.filter_groups.enable=true", "algorithm.filter_groups.metric=reward")
    lab = run(composed, *filters, "data.gen_batch_size=1", "data.train_max_samples=32")
    shares = []
    for step in range(1, 11):
        metrics, sampled = generated(lab, step, monkeypatch)
        told = metrics["soup/train/continuation/tokens"] + metrics["soup/cost/evicted_tokens"]
        assert told - metrics["soup/verified/accepted"] == sampled
        assert metrics["soup/train/groups_with_signal"] == 1
        shares.append(metrics["soup/verified/share"])
    assert max(shares) > 0
    assert all(0 <= share < 1 for share in shares)


def test_half_of_a_group_is_sampled_anew(composed: Any) -> None:
    lab = run(composed, "algorithm.soup.mixed_share=0.5")
    metrics = [lab.step(step) for step in range(1, 5)]
    assert [one["soup/verified/share"] for one in metrics] == [0, 0, 0.5, 0.5]


def test_what_is_too_old_is_not_verified_and_counted(composed: Any) -> None:
    """Eight prompts, four a step, in a new order in each epoch: their last visit is one to three steps ago."""
    lab = run(composed, "algorithm.soup.max_age=1")
    metrics = [lab.step(step) for step in range(1, 8)]
    too_old = [one["soup/cost/too_old"] for one in metrics]
    assert [32 * one["soup/verified/share"] for one in metrics[2:]] == [32 - dropped for dropped in too_old[2:]]
    assert 0 < sum(too_old) < 32 * 5
