"""What we add to verl's validation, which is never mixed: unbiased pass@k, entropy, and samples in the trackers."""

from typing import Any

from transfer_queue import KVBatchMeta

from recipe.soup.records.metrics_file import validation_accuracy
from recipe.soup.records.pass_at_k import pass_metrics
from recipe.soup.verl_adapter.lost_samples import LostSamples
from recipe.soup.verl_adapter.marked_samples import MarkedGenerations
from recipe.soup.verl_adapter.rewards import measurable, number, shown
from recipe.soup.verl_adapter.step_state import Stage, Surprise
from recipe.soup.verl_adapter.transfer_queue import fetch
from verl_ext.health import NOTICE


class ValidationStage(Stage):
    """Every validation of a run.

    Attributes:
        lost: counts the samples that never come.
    """

    lost: LostSamples

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._left_out: set[str] = set()

    def _validate(self) -> dict[str, float]:
        surprise = self.collected.surprise = Surprise()
        metrics = super()._validate()
        for step, accuracy in validation_accuracy({self.global_steps: metrics}).items():
            self.source.validated(step, accuracy)
        if surprise.tokens:
            metrics["soup/val/entropy"] = surprise.nats / surprise.tokens
        return metrics

    def _measure_surprise(self, batch: KVBatchMeta) -> None:
        """Sum up -log-probs of validation tokens, whose mean estimates the entropy; greedy decoding has none."""
        sampling = self.config.actor_rollout_ref.rollout.val_kwargs
        if not sampling.do_sample or sampling.temperature == 0:
            return
        data = fetch(batch, ["rollout_log_probs", "response_mask"])
        if "rollout_log_probs" in data:
            mask = data["response_mask"].values().bool()
            self.collected.surprise.nats -= data["rollout_log_probs"].values()[mask].sum().item()
            self.collected.surprise.tokens += int(mask.sum())

    def _val_metrics_update(
        self, data_sources: Any, sample_uids: Any, reward_extra_infos_dict: Any, sample_turns: Any, **kwargs: Any
    ) -> dict[str, float]:
        reward_extra_infos_dict = self._measurable(reward_extra_infos_dict)
        metrics = super()._val_metrics_update(
            data_sources, sample_uids, reward_extra_infos_dict, sample_turns, **kwargs
        )
        rewards = reward_extra_infos_dict["reward"]
        # Where only some data sources' rewards tell `acc`, it is None for the others.
        told = map(number, reward_extra_infos_dict.get("acc") or [None] * len(rewards))
        scores = [reward if acc is None else acc for acc, reward in zip(told, rewards, strict=True)]
        groups = zip(map(str, data_sources), map(str, sample_uids), strict=True)
        expected = kwargs.get("expected_acc_counts") or {}
        asked = sum(expected.values())
        metrics |= self.lost.validated(self.global_steps, asked, min(len(rewards), asked))
        return metrics | pass_metrics(zip(groups, map(float, scores), strict=True), expected)

    def _measurable(self, columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """What rewards told, without that of which verl's metrics take no mean; each such name is said once."""
        fit, rest = measurable(columns)
        for name in [name for name in rest if name not in self._left_out]:
            self._left_out.add(name)
            value = next(value for value in columns[name] if value is not None and number(value) is None)
            print(
                f"{NOTICE}what the reward tells as {name} is no number in some samples ({shown(value)}), so it is not "
                "among the validation's metrics.",
                flush=True,
            )
        return fit

    def _maybe_log_val_generations(self, inputs: Any, outputs: Any, scores: Any) -> None:
        if self.settings.mixes:
            shown = self.collected.shown
            self.validation_generations_logger = MarkedGenerations(self.validation_generations_logger, shown)
        super()._maybe_log_val_generations(inputs=inputs, outputs=outputs, scores=scores)
