"""What enters the loss, decided once for a whole batch; the real path and the lab both ask here.

In two parts: weights of a correction and advantages of `baseline=group` are the driver's, and need the first part.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from recipe.soup.algorithm.baselines import Estimate, compare
from recipe.soup.algorithm.batch import TrainRows, splice_behavior_log_probs
from recipe.soup.algorithm.continuation_weights import (
    continuation_metrics,
    continuation_weights,
    others_on_the_prefix,
)
from recipe.soup.algorithm.gates import alone, samples_that_count, without
from recipe.soup.algorithm.losses.registry import RATIOS
from recipe.soup.algorithm.token_weights import behind_an_outlier, trained_prefix


@dataclass(frozen=True)
class UpdateChoices:
    """How prefixes enter the update: the values of the keys of these names under `algorithm.soup`.

    Attributes:
        mixes: whether the run mixes at all; if not, the update is verl's.
        continuation_window: its `low` and `high`.
        negative_bounds: of `stale_negatives`; 0 and inf: none.
    """

    mixes: bool
    ratio: str
    baseline: str
    prefix_gradient: float
    second_moment: float | None
    loss_tokens: str
    continuation_weight: str
    continuation_window: tuple[float, float]
    negative_bounds: tuple[float, float]
    gate: str = "always"
    gate_successes: int = 0

    @property
    def weighs(self) -> bool:
        """Whether some tokens may have no gradient."""
        return self.prefix_gradient < 1 or self.second_moment is not None or self.stops_negatives

    @property
    def stops_negatives(self) -> bool:
        """Whether stale negatives lose their gradient from some token on."""
        return self.negative_bounds != (0.0, math.inf)


def ratio_fields(rows: TrainRows, choices: UpdateChoices) -> dict[str, torch.Tensor]:
    """Say what ratios are taken against, and where the prefix is.

    Returns:
        `old_log_probs` and `prefix_mask` (0 or 1), both (batch, response_length).
    """
    # Without mixing the step is verl's, even where a weight sync has interrupted responses.
    splices = choices.mixes and RATIOS[choices.ratio].splices
    spliced = splice_behavior_log_probs(rows.current_log_probs, rows.behavior_log_probs, rows.is_historical)
    return {
        "old_log_probs": spliced if splices else rows.current_log_probs,
        "prefix_mask": rows.is_prefix.long(),
    }


def loss_fields(
    rows: TrainRows, given: Mapping[str, torch.Tensor], choices: UpdateChoices, estimate: Estimate
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Decide advantages, weights and masks of each token; all tensors are (batch, response_length).

    Args:
        given: the driver's `advantages` (of `baseline=group`), `response_mask`, `loss_mask`, and `rollout_is_weights`
            where there are any.
        estimate: advantages within groups.

    Returns:
        the fields that take the place of the driver's, none where it has decided; and the prefix tokens that have a
        policy gradient (bool).
    """
    fields: dict[str, torch.Tensor] = {}
    if not choices.mixes:
        return fields, rows.is_prefix
    if choices.gate != "always":
        kept = samples_that_count(rows, choices.gate, choices.gate_successes)
        rows = without(rows, kept)
        fields |= {name: given[name] * kept[:, None] for name in ("response_mask", "loss_mask")}
        given = {**given, **fields}
    if choices.baseline != "group" or choices.gate != "always":
        advantages = compare(rows, choices.baseline, estimate) * given["response_mask"]
        if choices.gate != "always":
            # verl's estimators take the raw reward there: what the gate leaves alone would be pushed up whatever it is.
            advantages = advantages.masked_fill(alone(rows)[:, None], 0.0)
        fields |= {"advantages": advantages, "returns": advantages}
    advantages = fields.get("advantages", given["advantages"])
    trained = trained_prefix(rows, advantages, choices.prefix_gradient, choices.second_moment)
    weights = given.get("rollout_is_weights", torch.ones_like(advantages))
    log_ratio = rows.current_log_probs - rows.behavior_log_probs
    stopped = torch.zeros_like(trained)
    if choices.stops_negatives:
        stopped = behind_an_outlier(log_ratio, advantages, rows.is_historical, choices.negative_bounds)
        trained = trained & ~stopped
    if choices.continuation_weight != "none":
        behind, _ = continuation_weights(
            log_ratio, rows.is_historical, choices.continuation_weight, choices.continuation_window
        )
        on_prefix = torch.ones_like(weights)
        if choices.continuation_weight == "whole":
            on_prefix = others_on_the_prefix(log_ratio, rows.is_historical)
        chosen = torch.where(rows.is_historical, on_prefix, behind[:, None])
        weights = fields["rollout_is_weights"] = weights * chosen
    if choices.weighs:
        counts = (~rows.is_prefix | trained) & ~stopped
        fields["rollout_is_weights"] = weights * counts
        if choices.loss_tokens == "trained":
            # verl counts the tokens of `loss_mask`, and applies `response_mask`, to KL and entropy as well.
            fields |= {name: given[name] * counts for name in ("response_mask", "loss_mask")}
    return fields, trained


def weight_metrics(
    rows: TrainRows, advantages: torch.Tensor, trained: torch.Tensor, choices: UpdateChoices
) -> dict[str, float]:
    """What tokens weigh in a run that mixes: the share of prefix tokens with a gradient, and the continuation's weight.

    Args:
        advantages: (batch, response_length), that enter the loss.
        trained: bool, (batch, response_length), of `loss_fields`.
    """
    metrics = {"soup/train/prefix/trained": trained.sum().item() / max(rows.is_prefix.sum().item(), 1)}
    if choices.continuation_weight != "none":
        metrics |= continuation_metrics(rows, choices.continuation_weight, choices.continuation_window)
    if choices.stops_negatives:
        log_ratio = rows.current_log_probs - rows.behavior_log_probs
        stopped = behind_an_outlier(log_ratio, advantages, rows.is_historical, choices.negative_bounds)
        stopped &= rows.response_mask
        metrics["soup/train/stale_negatives/samples"] = float(stopped.any(dim=1).sum())
        metrics["soup/train/stale_negatives/tokens"] = float(stopped.sum())
    return metrics
