"""What SOUP changes between a step's rollout and its end: old log-probs, advantages, weights, metrics.

Stages of verl's trainers, whichever of them runs.
"""

import re
from typing import Any

import numpy as np
import torch
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.workers.utils.padding import response_to_nested

from recipe.soup.algorithm.baselines import compare
from recipe.soup.algorithm.batch import TrainRows, prefix_mask, splice_behavior_log_probs
from recipe.soup.algorithm.batch_metrics import drift_metrics, lag_metrics, train_metrics
from recipe.soup.algorithm.loss_metrics import PREFIX, means_of_loss_sums
from recipe.soup.algorithm.losses.registry import RATIOS
from recipe.soup.algorithm.token_weights import trained_prefix
from recipe.soup.names import SAMPLED_KEY
from recipe.soup.prefixes.requests import SampledPrefix
from recipe.soup.prefixes.source import PrefixSource
from recipe.soup.settings import SoupSettings
from recipe.soup.verl_adapter.marked_samples import Shown, mixed_samples
from recipe.soup.verl_adapter.recompute import recompute
from recipe.soup.verl_adapter.registrations import group_estimate
from recipe.soup.verl_adapter.transfer_queue import fetch, finished_samples, padded, store

TRAIN_FIELDS = [
    "responses",
    "response_mask",
    "old_log_probs",
    "rollout_log_probs",
    "policy_versions",
    "rm_scores",
    "entropy",
    "uid",
    "extra_fields",
]


NEEDS_FORWARD = re.compile("at_start|drift|engine_mismatch|entropy")
"""Metrics that compare with, or come from, the trainer's log-probs before the update."""


class UpdateStage(PPOTrainer):
    """Expects `settings`, `source`, `_visits`, `_arrived` and `_shown` of the trainer."""

    settings: SoupSettings
    source: PrefixSource
    _visits: dict[str, tuple[int, Any]]
    _rows: TrainRows
    _arrived: list[SampledPrefix]
    _shown: list[Shown]

    # ------------------------------------------------------------------ old log-probs

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        batch = super()._compute_old_log_prob(batch, metrics)
        data = fetch(batch, TRAIN_FIELDS)
        self._collect_seeds(data, batch.tags)
        self._harvest(metrics)
        rows = self._rows = self._train_rows(data)
        spliced = splice_behavior_log_probs(rows.current_log_probs, rows.behavior_log_probs, rows.is_historical)
        if self.source.wants_responses:
            by_trainer = self.settings.behavior_log_probs == "trainer"
            kept = response_to_nested(spliced, data["response_mask"]) if by_trainer else data["rollout_log_probs"]
            self.source.keep(list(finished_samples(data, batch.tags, kept, self._visits)))
            if self.trainer_mode == "sync":
                self._visits.clear()  # those of filtered groups as well
            else:
                for uid in rows.uids:  # other prompts are still being sampled
                    self._visits.pop(str(uid), None)
        measured = train_metrics(rows) | drift_metrics(rows, self.settings.behavior_log_probs == "trainer")
        if self.settings.mixes_lags or self.trainer_mode != "sync":
            measured |= lag_metrics(rows)
        if self.config.algorithm.rollout_correction.bypass_mode:  # no forward pass of the trainer, nothing to compare
            measured = {key: value for key, value in measured.items() if not NEEDS_FORWARD.search(key)}
        metrics.update(measured | self.source.metrics())
        # Without mixing the step is verl's, even where a weight sync has interrupted responses.
        splices = self.settings.mixes and RATIOS[self.settings.ratio].splices
        old_log_probs = spliced if splices else rows.current_log_probs
        prefix = rows.is_historical.to(torch.int64)
        store(batch, data["response_mask"], {"old_log_probs": old_log_probs, "prefix_mask": prefix})
        if self.settings.mixes and self.config.trainer.log_val_generations > 0:
            self._shown = mixed_samples(batch, rows, self.tokenizer, self.config.trainer.log_val_generations)
        return batch

    def _train_rows(self, data: Any) -> TrainRows:
        width = int(data["response_mask"].offsets().diff().max())
        response_mask = padded(data["response_mask"], width).bool()
        versions = padded(data["policy_versions"], width)
        current = self.global_steps - 1
        old_log_probs = padded(data["old_log_probs"], width)
        return TrainRows(
            response_mask=response_mask,
            is_historical=prefix_mask(versions, response_mask, current),
            policy_versions=versions,
            behavior_log_probs=padded(data["rollout_log_probs"], width),
            current_log_probs=old_log_probs,
            # verl's bypass_mode has no trainer forward, hence no entropy.
            entropy=padded(data["entropy"], width) if "entropy" in data else torch.zeros_like(old_log_probs),
            rewards=padded(data["rm_scores"], width).sum(dim=1),
            uids=list(data["uid"]),
            current_version=current,
        )

    # ------------------------------------------------------------------ prefixes that samples left for later steps

    def _collect_seeds(self, data: Any, tags: list[dict]) -> None:
        for extra, tag in zip(data["extra_fields"], tags, strict=True):
            if not tag.get("is_padding", False):  # verl's padding rows repeat the first sample's extra fields
                self._arrived += map(SampledPrefix.unpack, getattr(extra, "data", extra)[SAMPLED_KEY])

    def _harvest(self, metrics: dict) -> None:
        """Hand what has arrived to the source, before the trainer's weights change."""
        seeds, self._arrived = self._arrived, []
        if self.settings.behavior_log_probs == "trainer":
            rollout = self.config.actor_rollout_ref.rollout
            seeds, mismatch = recompute(
                seeds,
                self.actor_rollout_wg,
                ranks=max(self.actor_rollout_wg._query_dispatch_info("actor")) + 1,
                micro_batch_size=rollout.log_prob_micro_batch_size_per_gpu,
                temperature=rollout.temperature,
                eos_token_id=self.tokenizer.eos_token_id,
            )
            metrics["soup/prefix/engine_mismatch/mean"] = float(np.mean(mismatch)) if mismatch else 0.0
            metrics["soup/prefix/engine_mismatch/max"] = max(mismatch, default=0.0)
        self.source.harvest(seeds)
        if self.trainer_mode == "sync":
            self.source.in_flight.clear()  # every sample of the step is there: what has not arrived is lost

    # ------------------------------------------------------------------ advantages and weights

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        batch = super()._compute_advantage(batch, metrics)
        if self.settings.mixes:
            self._compare(batch)
            self._weigh(batch, metrics)
        return batch

    def _compare(self, batch: KVBatchMeta) -> None:
        """Put the advantages of another baseline in the place of verl's, which are those of `group`."""
        if self.settings.baseline == "group":
            return
        data = fetch(batch, ["responses", "response_mask"])
        response_ids = padded(data["responses"], self._rows.is_historical.size(1))
        advantages = compare(
            self._rows, response_ids, self.settings.baseline, group_estimate(self.config.algorithm)
        ) * padded(data["response_mask"], self._rows.is_historical.size(1))
        store(batch, data["response_mask"], {"advantages": advantages, "returns": advantages})

    def _weigh(self, batch: KVBatchMeta, metrics: dict) -> None:
        """Take prefix tokens out of the policy gradient, if the settings say so; a threshold needs the whole batch."""
        settings, rows = self.settings, self._rows
        data = fetch(batch, ["response_mask", "loss_mask", "advantages", "rollout_is_weights"])
        width = rows.is_historical.size(1)
        trained = trained_prefix(settings, rows, padded(data["advantages"], width))
        tokens = rows.is_historical.sum().item()
        metrics["soup/train/prefix/trained"] = trained.sum().item() / tokens if tokens else 0.0
        if not settings.weighs:
            return
        counts = ~rows.is_historical | trained
        weights = counts.float()
        if "rollout_is_weights" in data:
            weights = weights * padded(data["rollout_is_weights"], width)
        fields = {"rollout_is_weights": weights}
        if settings.loss_tokens == "trained":
            # verl counts the tokens of `loss_mask`, and applies `response_mask`, to KL and entropy as well.
            fields |= {name: padded(data[name], width) * counts for name in ("response_mask", "loss_mask")}
        store(batch, data["response_mask"], fields)

    # ------------------------------------------------------------------ the update

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        batch = super()._update_actor(batch, metrics)
        prefix = f"actor/{PREFIX}"
        sums = {key.removeprefix("actor/"): metrics.pop(key) for key in list(metrics) if key.startswith(prefix)}
        metrics.update(means_of_loss_sums(sums) if sums else {})
        return batch
