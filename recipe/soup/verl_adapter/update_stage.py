"""What SOUP changes between a step's rollout and its end: old log-probs, advantages, weights, metrics.

Stages of verl's trainers, whichever of them runs. What enters the loss is decided in `algorithm/update.py`.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from transfer_queue import KVBatchMeta
from verl.workers.utils.padding import response_to_nested

from recipe.soup.algorithm.batch import TrainRows, splice_behavior_log_probs
from recipe.soup.algorithm.batch_metrics import (
    NEEDS_FORWARD,
    demonstration_metrics,
    drift_metrics,
    lag_metrics,
    mismatch_metrics,
    staleness_metrics,
    train_metrics,
    wait_metrics,
)
from recipe.soup.algorithm.loss_metrics import PREFIX, means_of_loss_sums
from recipe.soup.algorithm.update import loss_fields, ratio_fields, weight_metrics
from recipe.soup.verl_adapter.marked_samples import mixed_samples
from recipe.soup.verl_adapter.registrations import group_estimate, update_choices
from recipe.soup.verl_adapter.rewards import shown
from recipe.soup.verl_adapter.scores import by_trainer
from recipe.soup.verl_adapter.step_state import Stage
from recipe.soup.verl_adapter.transfer_queue import (
    EVICTED_FIELDS,
    TRAIN_FIELDS,
    fetch,
    finished_samples,
    padded,
    store,
    stored_in_float32,
    train_rows,
    without_padding,
)
from verl_ext.health import end_run

GIVEN_FIELDS = ["response_mask", "loss_mask", "advantages", "rollout_is_weights"]
"""Of what verl has decided, what `loss_fields` asks for."""


def require_finite(step: int, batch: KVBatchMeta, rows: TrainRows, tokenizer: Any) -> None:
    """The last look at a batch's rewards: a reward model, or an agent loop of one's own, may have given them.

    Raises:
        RunEndedError: one is not finite.
    """
    wrong = torch.nonzero(~torch.isfinite(rows.rewards))[:, 0].tolist()
    if wrong:
        first = KVBatchMeta(partition_id=batch.partition_id, keys=[batch.keys[wrong[0]]], tags=[{}])
        sample = fetch(first, ["prompts", "responses"])
        prompt, response = (shown(tokenizer.decode(sample[name][0].tolist())) for name in ("prompts", "responses"))
        end_run(
            f"In step {step} {len(wrong)} rewards are not finite; the first is {rows.rewards[wrong[0]]:g} (prompt "
            f"{prompt}, response {response}). Mend the reward model, or whatever else gave it."
        )


class UpdateStage(Stage):
    """From the samples of a step to the fields that its loss reads."""

    # ------------------------------------------------------------------ old log-probs

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        # Without mixing the field stays as verl stores it.
        with stored_in_float32("old_log_probs") if self.settings.mixes else nullcontext():
            batch = super()._compute_old_log_prob(batch, metrics)
        data = fetch(batch, [*TRAIN_FIELDS, *(["prompts"] if self.settings.verifies else [])])
        rows = self.collected.rows = train_rows(data, self.global_steps - 1)
        self.collected.all_rows.append(rows)
        require_finite(self.global_steps, batch, rows, self.tokenizer)
        self.collected.add_prefixes(data["extra_fields"], batch.tags)
        self._harvest(metrics)
        self._keep(data, batch.tags, rows)
        metrics.update(self._measured(rows) | self.source.metrics())
        metrics["soup/cost/evicted_tokens"] = float(self.collected.evicted_tokens)
        if self.trainer_mode != "sync":
            sent = [tag["global_steps"] for tag in without_padding(batch).tags]
            metrics.update(wait_metrics([self.global_steps - step for step in sent]))
        store(batch, data["response_mask"], ratio_fields(rows, update_choices(self.settings)))
        if self.settings.mixes and self.config.trainer.log_val_generations > 0:
            self.collected.shown = mixed_samples(batch, rows, self.tokenizer, self.config.trainer.log_val_generations)
        return batch

    def _harvest(self, metrics: dict) -> None:
        """Hand the prefixes that were collected to the source, before the trainer's weights change."""
        prefixes = self.collected.prefixes
        if self.settings.behavior_log_probs == "trainer":
            prefixes, mismatch = by_trainer(self, prefixes)
            metrics.update(mismatch_metrics(mismatch))
        self.source.harvest(prefixes)
        if self.trainer_mode == "sync":
            self.source.in_flight.clear()  # every sample of the step is there: what has not arrived is lost

    def _keep(self, data: Any, tags: list[dict], rows: TrainRows) -> None:
        """Hand the responses to a source that learns from them, with the log-probs of whoever is to tell them."""
        if not self.source.wants_responses:
            return
        log_probs = data["rollout_log_probs"]
        if self.settings.behavior_log_probs == "trainer":
            spliced = splice_behavior_log_probs(rows.current_log_probs, rows.behavior_log_probs, rows.is_historical)
            log_probs = response_to_nested(spliced, data["response_mask"])
        self.source.keep(list(finished_samples(data, tags, log_probs)))

    def _measured(self, rows: TrainRows) -> dict[str, float]:
        """Tell of the batch what can be told before the update."""
        measured = train_metrics(rows) | drift_metrics(rows, self.settings.behavior_log_probs == "trainer")
        if self.settings.mixes_lags or self.trainer_mode != "sync":
            measured |= lag_metrics(rows)
        if self.settings.demonstrates:
            gate = self.settings.demonstrations
            measured |= demonstration_metrics(rows, gate.gate, gate.gate_successes)
        if self.trainer_mode != "sync":
            measured |= staleness_metrics(rows)
        if self.config.algorithm.rollout_correction.bypass_mode:  # no forward pass of the trainer, nothing to compare
            measured = {key: value for key, value in measured.items() if not NEEDS_FORWARD.search(key)}
        return measured

    def _drop_groups(self, uids: Iterable[str], batch: KVBatchMeta) -> None:
        """Save the prefixes that groups brought before verl drops them: they are for other prompts."""
        if batch.keys:
            data = fetch(batch, EVICTED_FIELDS)
            self.collected.add_prefixes(data["extra_fields"], batch.tags)
            self.collected.evicted_tokens += int((data["policy_versions"].values() >= self.global_steps - 1).sum())
            if self.source.wants_evicted:
                self.source.keep(list(finished_samples(data, batch.tags, data["rollout_log_probs"])))

    # ------------------------------------------------------------------ advantages and weights

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        batch = super()._compute_advantage(batch, metrics)
        rows = self.collected.rows
        assert rows is not None, "old log-probs come first"
        counts = rows.response_mask
        correction = self.config.algorithm.get("rollout_correction") or {}
        if self.settings.mixes or correction.get("rollout_rs"):
            data = fetch(batch, GIVEN_FIELDS)
            given = {name: padded(data[name], counts.size(1)) for name in GIVEN_FIELDS if name in data}
            if self.settings.mixes:
                given |= self._replace_fields(batch, rows, given, data["response_mask"], metrics)
            counts = given["response_mask"] * given["loss_mask"]
        metrics.update(self.broken.before_update(self.global_steps, counts))
        self.collected.clear()
        return batch

    def _replace_fields(
        self, batch: KVBatchMeta, rows: TrainRows, given: dict[str, torch.Tensor], like: torch.Tensor, metrics: dict
    ) -> dict[str, torch.Tensor]:
        """Put SOUP's advantages, weights and masks in the place of verl's, where they differ; returns those.

        Args:
            given: what verl has decided, (batch, response_length).
            like: the nested response mask.
        """
        choices, estimate = update_choices(self.settings), group_estimate(self.config.algorithm)
        fields, trained = loss_fields(rows, given, choices, estimate)
        metrics.update(weight_metrics(rows, (given | fields)["advantages"], trained, choices))
        if fields:
            store(batch, like, fields)
        return fields

    # ------------------------------------------------------------------ the update

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        batch = super()._update_actor(batch, metrics)
        metrics.update(self.broken.after_update(self.global_steps, metrics))
        prefix = f"actor/{PREFIX}"
        sums = {key.removeprefix("actor/"): metrics.pop(key) for key in list(metrics) if key.startswith(prefix)}
        if sums:
            self.collected.loss_sums.append(sums)
            metrics.update(means_of_loss_sums(sums))
        return batch
