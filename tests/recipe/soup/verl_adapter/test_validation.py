"""pass@k and entropy beside verl's validation metrics, through verl's own functions."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from training_worker import COUNTDOWN, StillWorkers, Store, make_trainer, recorded
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_base import PPOTrainer

from recipe.soup.verl_adapter.trainer import SoupTrainer
from recipe.soup.verl_adapter.validation import pass_metrics
from verl_ext.health import NOTICE


def test_every_choice_of_k_samples() -> None:
    """Against the share of all choices with a correct sample; sources apart; samples that never came are wrong."""
    expected = {("math", "a"): 5, ("math", "b"): 5, ("code", "c"): 4}
    scores = {"a": [1, 0, 0, 1, 0], "b": [0, 0, -1], "c": [0.5, 0, 0, 0]}
    sources = {"a": "math", "b": "math", "c": "code"}
    samples = [((sources[uid], uid), float(score)) for uid, values in scores.items() for score in values]
    found = pass_metrics(samples, expected)

    def by_hand(uid: str, k: int) -> float:
        values = [score > 0 for score in scores[uid]] + [False] * (expected[sources[uid], uid] - len(scores[uid]))
        return float(np.mean([any(chosen) for chosen in combinations(values, k)]))

    assert found == pytest.approx(
        {
            "soup/val/math/pass@1": (by_hand("a", 1) + by_hand("b", 1)) / 2,
            "soup/val/math/pass@4": (by_hand("a", 4) + by_hand("b", 4)) / 2,
            "soup/val/code/pass@1": 0.25,
            "soup/val/code/pass@4": 1.0,
        }
    )


def test_beside_verls_metrics(composed: Any) -> None:
    trainer: Any = make_trainer(SoupTrainer, composed(*COUNTDOWN, "algorithm=soup"))
    uids, scores = ["a"] * 4 + ["b"] * 4, [1.0, 0, 0, 0, 0, 0, 0, 0]
    expected = {("countdown", "a"): 4, ("countdown", "b"): 4}
    metrics = trainer._val_metrics_update(
        ["countdown"] * 8, uids, {"reward": scores, "acc": scores}, [2] * 8, expected_acc_counts=expected
    )
    assert metrics["soup/val/countdown/pass@4"] == 0.5
    assert metrics["val-core/countdown/acc/mean@4"] == pytest.approx(1 / 8)
    assert metrics["soup/val/countdown/pass@1"] == pytest.approx(1 / 8)


def test_a_source_whose_reward_tells_no_accuracy(composed: Any) -> None:
    """verl fills `acc` with None for it."""
    trainer: Any = make_trainer(SoupTrainer, composed(*COUNTDOWN, "algorithm=soup"))
    told: list[Any] = [None, None, 1.0, 0.0]
    metrics = trainer._val_metrics_update(
        ["gsm8k"] * 2 + ["aime"] * 2,
        ["a", "a", "b", "b"],
        {"reward": [1.0, 1.0, 1.0, -1.0], "acc": told},
        [2] * 4,
        expected_acc_counts={("gsm8k", "a"): 2, ("aime", "b"): 2},
    )
    assert metrics["soup/val/gsm8k/pass@1"] == 1.0
    assert metrics["soup/val/aime/pass@1"] == 0.5


def test_samples_that_never_came_are_counted_and_told(composed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    trainer: Any = make_trainer(SoupTrainer, composed(*COUNTDOWN, "algorithm=grpo"))
    told = {"reward": [1.0, 0.0, 1.0], "acc": [1.0, 0.0, 1.0]}
    expected = {("countdown", "a"): 4, ("countdown", "b"): 4}
    metrics = trainer._val_metrics_update(["countdown"] * 3, ["a"] * 3, told, [2] * 3, expected_acc_counts=expected)
    names = ("asked", "arrived", "lost_share")
    assert [metrics[f"soup/val/samples/{name}"] for name in names] == [8, 3, 5 / 8]
    assert metrics["soup/val/countdown/pass@1"] == pytest.approx((2 / 4 + 0) / 2)
    assert f"{NOTICE}the validation after step 5 lost 5 of 8 samples" in capsys.readouterr().out


@pytest.mark.parametrize("odd", [
    {"seen": [{1}, {2}, {3}, None]}, {"parts": [np.ones(2), np.ones(3), None, None]}, {"mixed": [1.0, "text", None, 2]},
    {"detail": [[1], [1, 2], [], None]}, {"acc": ["yes", None, "no", None]}, {"acc": [None, 1.0, "no", None]},
    {"pred": [[1], {2}, None, 3.0], "acc": [1.0, 1.0, 0.0, 0.0]}, {"why": [None] * 4},
])  # fmt: skip
def test_whatever_rewards_tell_a_validation_has_its_metrics(
    odd: dict[str, list[Any]], composed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """verl by itself takes means of anything that does not begin with a text."""
    trainer: Any = make_trainer(SoupTrainer, composed(*COUNTDOWN, "algorithm=soup"))
    for _ in range(2):
        metrics = trainer._val_metrics_update(
            ["countdown"] * 4,
            ["a"] * 4,
            {"reward": [1.0, 0.0, 0.0, 0.0], "other": [1.0, 2.0, None, 3.0]} | odd,
            [2] * 4,
            expected_acc_counts={("countdown", "a"): 4},
        )
        assert metrics["soup/val/countdown/pass@4"] == 1.0
        assert metrics["val-aux/countdown/other/mean@3"] == 2.0
    left_out = "is no number in some samples" in capsys.readouterr().out
    assert left_out == bool({"seen", "parts", "mixed", "detail"} & set(odd) or odd.get("acc", [0])[1:3] == [1.0, "no"])


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_entropy_is_the_mean_surprise_of_sampled_tokens(
    composed: Any, store: Store, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    """Through verl's replay buffer's `sample`, for validation only, over responses of unequal length."""
    config = composed(*COUNTDOWN, "algorithm=soup", f"actor_rollout_ref.rollout.val_kwargs.temperature={temperature}")
    batch = recorded(store)
    half = KVBatchMeta(partition_id="val", keys=batch.keys[:20], tags=batch.tags[:20])
    monkeypatch.setattr(ReplayBuffer, "sample", lambda *_, partition_id, **__: (half, {}))
    trainer: Any = make_trainer(SoupTrainer, config, StillWorkers(store))

    def validate(self: Any) -> dict[str, float]:
        for _ in range(2):  # two batches of the validation set
            self.replay_buffer.sample(global_steps=5, partition_id="val", batch_size=20)
        self.replay_buffer.sample(global_steps=5, partition_id="train", batch_size=20)
        return {"val-core/countdown/acc/mean@4": 0.5}

    monkeypatch.setattr(PPOTrainer, "_validate", validate)
    metrics = trainer._validate()
    surprise = -torch.cat([store.rows[key]["rollout_log_probs"] for key in half.keys])
    if temperature:
        assert metrics["soup/val/entropy"] == pytest.approx(surprise.mean().item(), rel=1e-5)
    else:
        assert "soup/val/entropy" not in metrics
