"""Steps that trained nothing: through verl's training worker on the recorded batch, and the judge by itself."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from training_worker import COUNTDOWN, STEP, StillWorkers, Store, WorkerGroup, make_trainer, recorded
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from recipe.soup.run_settings import in_float16
from recipe.soup.verl_adapter import sync_stage
from recipe.soup.verl_adapter.broken_steps import KEY, NO_TOKENS, NO_UPDATE, OLD_WEIGHTS, SCALES, BrokenSteps
from recipe.soup.verl_adapter.trainer import SoupTrainer
from verl_ext.health import ENDED, NOTICE, RunEndedError

pytestmark = pytest.mark.usefixtures("process_group")

FINE = {"actor/pg_loss": 0.1, "actor/loss": 0.1, "actor/grad_norm": 2.0, "actor/lr": 1e-3}


def advantages(trainer: Any, batch: Any, metrics: dict) -> Any:
    trainer._install_loss()
    return trainer._compute_advantage(trainer._compute_old_log_prob(batch, metrics), metrics)


@pytest.mark.parametrize("algorithm", ["soup", "grpo"])
@pytest.mark.parametrize("answer", ["stop", "warn"])
def test_an_update_that_verl_skips_without_a_word_is_found(
    algorithm: str, answer: str, composed: Any, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sample's advantage is NaN, so one of two mini-batches has no gradient that is a number."""
    config = composed(*COUNTDOWN, f"algorithm={algorithm}", f"{KEY}={answer}")
    group = WorkerGroup(config, store)
    trainer = make_trainer(SoupTrainer, config, group)
    metrics: dict = {}
    batch = advantages(trainer, recorded(store), metrics)
    assert metrics[NO_TOKENS] == 0
    store.rows[batch.keys[0]]["advantages"][:] = torch.nan
    if answer == "stop":
        with pytest.raises(RunEndedError, match=r"In step 5 the weights were not updated.*actor/grad_norm=nan") as end:
            trainer._update_actor(batch, metrics)
        assert str(end.value) in capsys.readouterr().out
        assert str(end.value).endswith(f"{KEY}=warn goes on all the same. {ENDED}")
    else:
        trainer._update_actor(batch, metrics)
        assert metrics[NO_UPDATE] == 1
        assert f"{NOTICE}In step 5 the weights were not updated" in capsys.readouterr().out
        trainer._update_actor(batch, metrics)
        assert NOTICE not in capsys.readouterr().out  # once
    assert not trainer.broken.trained


@pytest.mark.parametrize("algorithm", ["soup", "grpo"])
def test_a_step_without_a_token_to_train_on_is_found_before_its_update(
    algorithm: str, composed: Any, store: Store
) -> None:
    """verl's rejection by ratios takes every token of every sample out of the loss."""
    rejects = ["rollout_rs=token_k2", "rollout_rs_threshold=0.01"]
    overrides = [f"algorithm.rollout_correction.{override}" for override in rejects]
    config = composed(*COUNTDOWN, f"algorithm={algorithm}", *overrides)
    trainer = make_trainer(SoupTrainer, config, WorkerGroup(config, store))
    batch = recorded(store)
    for row in store.rows.values():
        row["rollout_log_probs"] -= 5
        row["policy_versions"].fill_(STEP - 1)  # on a prefix there is nothing to compare with
    with pytest.raises(RunEndedError, match=r"In step 5 no token has a loss: algorithm.rollout_correction"):
        advantages(trainer, batch, {})


def test_nothing_but_padding_is_nothing_to_train_on(composed: Any, store: Store) -> None:
    config = composed(*COUNTDOWN, "algorithm=grpo", f"{KEY}=warn")
    trainer = make_trainer(SoupTrainer, config, StillWorkers(store))
    batch = trainer._compute_old_log_prob(recorded(store), {})
    trainer.collected.rows = replace(
        trainer.collected.rows, response_mask=torch.zeros_like(trainer.collected.rows.response_mask)
    )
    metrics: dict = {}
    trainer._compute_advantage(batch, metrics)
    assert metrics[NO_TOKENS] == 1


def test_a_good_update_is_not_complained_of(composed: Any, store: Store) -> None:
    config = composed(*COUNTDOWN, "algorithm=soup")
    trainer = make_trainer(SoupTrainer, config, WorkerGroup(config, store))
    for _ in range(2):
        metrics: dict = {}
        trainer._update_actor(advantages(trainer, recorded(store), metrics), metrics)
        assert (metrics[NO_TOKENS], metrics[NO_UPDATE]) == (0, 0)
    assert trainer.broken.trained  # the first one's learning rate may have been that of a warm-up


@pytest.mark.parametrize("change", [{"actor/grad_norm": float("inf")}, {"actor/pg_loss": float("nan")},
                                    {"actor/kl_loss": float("inf")}, {"critic/grad_norm": float("nan")}])  # fmt: skip
def test_every_loss_and_every_gradient_must_be_finite(change: dict[str, float]) -> None:
    with pytest.raises(RunEndedError, match="In step 3 the weights"):
        BrokenSteps("stop").after_update(3, FINE | change)


def test_whether_weights_must_have_changed_is_a_matter_of_gradient_and_learning_rate() -> None:
    broken = BrokenSteps("stop")
    counts = torch.ones(2, 3)
    expected = [  # what each step reports, and whether its own learning rate, told by the step before, was above 0
        (FINE | {"actor/lr": 0.0}, False),  # unknown: the run's first
        (FINE, False),
        (FINE | {"actor/grad_norm": 0.0}, False),
        (FINE, True),
    ]
    for step, (metrics, trained) in enumerate(expected, start=1):
        broken.before_update(step, counts)
        broken.after_update(step, metrics)
        assert broken.trained == trained, step
    broken.before_update(5, counts)  # and no update: verl's warm-up of a critic
    assert not broken.trained


def test_float16_finds_its_scale_by_overflows(composed: Any) -> None:
    """torch's gradient scaler skips steps by design, but not for ever, and never for a loss."""
    overflow = FINE | {"actor/grad_norm": float("inf")}
    broken = BrokenSteps("stop", scales=True)
    for step in range(SCALES):
        broken.after_update(step, overflow)
    broken.after_update(SCALES, FINE)
    for step in range(SCALES):
        broken.after_update(step, overflow)
    with pytest.raises(RunEndedError):
        broken.after_update(SCALES, overflow)
    with pytest.raises(RunEndedError):
        BrokenSteps("stop", scales=True).after_update(1, FINE | {"actor/loss": float("nan")})
    param_dtype = "+actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype"
    config = composed("algorithm=grpo", f"{param_dtype}=fp16")
    assert in_float16(config)
    assert not in_float16(composed("algorithm=grpo"))


@pytest.mark.parametrize("algorithm", ["soup", "grpo"])
def test_the_engine_is_asked_after_the_sync_of_a_step_that_trained(
    algorithm: str, composed: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(SoupTrainer, composed(*COUNTDOWN, f"algorithm={algorithm}", f"{KEY}=warn"))
    events: list[Any] = []
    monkeypatch.setattr(PPOTrainerSync, "on_step_end", lambda self: events.append("sync"))
    answers: list[str | None] = [None, "a vLLM worker got the same 3 weights as before"]

    def ask(engines: list[Any]) -> str | None:
        events.append(engines)
        return answers.pop(0)

    monkeypatch.setattr(sync_stage, "stale_weights", ask)
    monkeypatch.setattr(trainer.source, "updated", lambda step: None)
    trainer.engines, trainer.timing_raw = ["replica"], {}

    def step(trained: bool) -> float:
        trainer.broken.trained = trained
        trainer.on_step_end()
        return trainer._consume_sync_metrics()[OLD_WEIGHTS]

    assert [step(False), step(True), step(True)] == [0, 0, 1]
    assert events == ["sync", "sync", ["replica"], "sync", ["replica"]]
    trainer.config.actor_rollout_ref.rollout.checkpoint_engine.backend = "delta_sharded"
    assert step(True) == 0  # what is sent as differences does not come by where arrivals are noted
    told = capsys.readouterr().out
    assert f"{NOTICE}After step 5, whose update had a gradient, a vLLM worker got the same 3 weights as before" in told
