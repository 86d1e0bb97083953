"""What we add to verl's validation, which is never mixed: unbiased pass@k, entropy, and samples in the trackers."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_base import PPOTrainer

from recipe.soup.prefixes.source import PrefixSource
from recipe.soup.records.metrics_file import validation_accuracy
from recipe.soup.records.pass_at_k import PASS_AT, mean_pass_at_k
from recipe.soup.settings import SoupSettings
from recipe.soup.verl_adapter.marked_samples import MarkedGenerations, Shown
from recipe.soup.verl_adapter.transfer_queue import fetch

Group = tuple[str, str]
"""A prompt's data source and uid."""


def pass_metrics(scores: Iterable[tuple[Group, float]], expected: dict[Group, int]) -> dict[str, float]:
    """`soup/val/<data source>/pass@k` over prompts, for each k of `PASS_AT` that all of them have samples for.

    Args:
        scores: of each sample; above 0 is correct. (verl's `best@k` is a bootstrap of the mean of the best score.)
        expected: samples of each prompt; those that failed to arrive count as wrong.
    """
    correct: dict[Group, int] = dict.fromkeys(expected, 0)
    for group, score in scores:
        correct[group] += score > 0
    counts: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for group, hits in correct.items():
        counts[group[0]].append((expected[group], hits))
    return {
        f"soup/val/{source}/pass@{k}": mean_pass_at_k(prompts, k)
        for source, prompts in counts.items()
        for k in PASS_AT
        if k <= min(samples for samples, _ in prompts)
    }


class ValidationStage(PPOTrainer):
    """Expects `settings`, `source` and `_shown` of the trainer."""

    settings: SoupSettings
    source: PrefixSource
    _shown: list[Shown]
    _surprise: tuple[float, int]

    def _validate(self) -> dict[str, float]:
        self._surprise = (0.0, 0)
        metrics = super()._validate()
        for step, accuracy in validation_accuracy({self.global_steps: metrics}).items():
            self.source.validated(step, accuracy)
        nats, tokens = self._surprise
        if tokens:
            metrics["soup/val/entropy"] = nats / tokens
        return metrics

    def _measure_surprise(self, batch: KVBatchMeta) -> None:
        """Sum up -log-probs of validation tokens, whose mean estimates the entropy; greedy decoding has none."""
        sampling = self.config.actor_rollout_ref.rollout.val_kwargs
        if not sampling.do_sample or sampling.temperature == 0:
            return
        data = fetch(batch, ["rollout_log_probs", "response_mask"])
        if "rollout_log_probs" in data:
            mask = data["response_mask"].values().bool()
            nats, tokens = self._surprise
            self._surprise = (nats - data["rollout_log_probs"].values()[mask].sum().item(), tokens + int(mask.sum()))

    def _val_metrics_update(
        self, data_sources: Any, sample_uids: Any, reward_extra_infos_dict: Any, sample_turns: Any, **kwargs: Any
    ) -> dict[str, float]:
        metrics = super()._val_metrics_update(
            data_sources, sample_uids, reward_extra_infos_dict, sample_turns, **kwargs
        )
        rewards = reward_extra_infos_dict["reward"]
        # Where only some data sources' rewards tell `acc`, it is None for the others.
        told = reward_extra_infos_dict.get("acc") or [None] * len(rewards)
        scores = [reward if acc is None else acc for acc, reward in zip(told, rewards, strict=True)]
        groups = zip(map(str, data_sources), map(str, sample_uids), strict=True)
        expected = kwargs.get("expected_acc_counts") or {}
        return metrics | pass_metrics(zip(groups, map(float, scores), strict=True), expected)

    def _maybe_log_val_generations(self, inputs: Any, outputs: Any, scores: Any) -> None:
        if self.settings.mixes:
            self.validation_generations_logger = MarkedGenerations(self.validation_generations_logger, self._shown)
        super()._maybe_log_val_generations(inputs=inputs, outputs=outputs, scores=scores)
