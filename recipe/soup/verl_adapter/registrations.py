"""SOUP's names in verl's registries: the advantage estimator and the policy loss `soup`, and the worker's loss.

verl imports this module right after `verl.trainer.ppo.core_algos`, in every process that computes a loss.
"""

from collections.abc import Hashable, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from verl.trainer.ppo.core_algos import (
    agg_loss,
    compute_grpo_outcome_advantage,
    get_adv_estimator_fn,
    register_adv_est,
    register_policy_loss,
)

from recipe.soup.algorithm.baselines import Estimate
from recipe.soup.algorithm.loss_metrics import loss_sums
from recipe.soup.algorithm.losses.inputs import Clip, LossInputs
from recipe.soup.algorithm.losses.registry import RATIOS
from recipe.soup.algorithm.pass_at_k import pass_at_k_advantages
from recipe.soup.algorithm.update import UpdateChoices
from recipe.soup.settings import SoupSettings
from verl_ext import policy_losses  # registers `ctpo` and `m2po`; may be half imported, if it was asked for before verl


@register_adv_est("soup")
def compute_soup_advantage(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, index: np.ndarray, config: Any, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """GRPO's advantage over one group per prompt, mixed and pure samples together (our choice; the paper is silent).

    Other baselines than `algorithm.soup.baseline=group` are put in its place afterwards, by the trainer.

    Args:
        token_level_rewards: (batch, response_length).
        response_mask: (batch, response_length).
        index: (batch,), the group of each row.
        config: verl's `algorithm` node; `norm_adv_by_std_in_grpo` is honoured.

    Returns:
        advantages and returns, both (batch, response_length).
    """
    return compute_grpo_outcome_advantage(
        token_level_rewards=token_level_rewards,
        response_mask=response_mask,
        index=index,
        norm_adv_by_std_in_grpo=config.get("norm_adv_by_std_in_grpo", True),
    )


@register_adv_est("pass_at_k")
def compute_pass_at_k_advantage(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, index: np.ndarray, config: Any, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The advantage of pass@k training (`algorithm/pass_at_k.py`), with k = `algorithm.soup.pass_k`.

    Args and returns as of `compute_soup_advantage`.
    """
    of_samples = pass_at_k_advantages(token_level_rewards.sum(dim=-1), index.tolist(), config.soup.pass_k)
    advantages = of_samples[:, None] * response_mask
    return advantages, advantages


def group_estimate(algorithm: Any) -> Estimate:
    """verl's estimator on one number a sample, for baselines of ours.

    Args:
        algorithm: verl's `algorithm` node.
    """
    # Registered as `grpo` it would not read the config.
    name = "soup" if algorithm.adv_estimator == "grpo" else algorithm.adv_estimator
    estimator: Any = get_adv_estimator_fn(name)

    def estimate(rewards: torch.Tensor, groups: Sequence[Hashable]) -> torch.Tensor:
        index = np.empty(len(groups), dtype=object)
        index[:] = [str(group) for group in groups]
        column, mask = rewards[:, None].float(), torch.ones(len(groups), 1)
        return estimator(token_level_rewards=column, response_mask=mask, index=index, config=algorithm)[0][:, 0]

    return estimate


_micro_batch: ContextVar[tuple[SoupSettings, torch.Tensor]] = ContextVar("settings, and prefix of the micro-batch")
"""What verl's seam for policy losses does not pass on; the prefix is bool, (batch, response_length)."""


@register_policy_loss("soup")
def compute_soup_policy_loss(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The loss that `algorithm.soup.ratio` names, aggregated by verl; all tensors are (batch, response_length).

    Args:
        old_log_prob: what ratios are taken against (`losses/registry.py`).
        rollout_is_weights: weight of each token, of verl's rollout correction and of `algorithm/token_weights.py`.

    Returns:
        the loss, and verl's metrics of a clipped loss.
    """
    settings, prefix = _micro_batch.get()
    clip = clip_ranges(settings, config)
    weights = settings.shaping_gamma, settings.nll_coefficient
    inputs = LossInputs(log_prob, old_log_prob, advantages, prefix, clip, *weights)
    outputs = RATIOS[settings.ratio].loss(inputs)
    losses = outputs.losses if rollout_is_weights is None else outputs.losses * rollout_is_weights
    loss = agg_loss(loss_mat=losses, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info)
    held = outputs.clipped_low | outputs.clipped_high
    return loss, policy_losses.clip_metrics(log_prob, old_log_prob, held, outputs.clipped_dual, response_mask)


def weigh_decoupled(config: DictConfig, settings: SoupSettings) -> None:
    """With `ratio=decoupled`, let verl weigh each token by truncated pi_old / mu, if it is not told how already."""
    correction = config.algorithm.get("rollout_correction")
    if settings.mixes and settings.ratio == "decoupled" and correction.rollout_is is None:
        correction.rollout_is = "token"


def update_choices(settings: SoupSettings) -> UpdateChoices:
    """Read off the settings how historical tokens enter the update."""
    return UpdateChoices(
        mixes=settings.mixes,
        ratio=settings.ratio,
        baseline=settings.baseline,
        prefix_gradient=settings.prefix_gradient,
        second_moment=settings.second_moment,
        loss_tokens=settings.loss_tokens,
        continuation_weight=settings.continuation_weight,
        continuation_window=(settings.continuation_window.low, settings.continuation_window.high),
        negative_bounds=settings.stale_negatives.bounds,
        gate=settings.demonstrations.gate,
        gate_successes=settings.demonstrations.gate_successes,
    )


def clip_ranges(settings: SoupSettings, config: Any) -> Clip:
    """The clip ranges of verl's actor, with those of the prefix where it has its own."""
    low = config.clip_ratio_low if config.clip_ratio_low is not None else config.clip_ratio
    high = config.clip_ratio_high if config.clip_ratio_high is not None else config.clip_ratio
    own = settings.prefix_clip
    return Clip(
        low=low,
        high=high,
        prefix_low=low if own.low is None else own.low,
        prefix_high=high if own.high is None else own.high,
        dual=config.get("clip_ratio_c", 3.0),
    )


def soup_loss(
    config: Any, model_output: dict[str, torch.Tensor], data: Any, dp_group: Any = None, *, settings: SoupSettings
) -> tuple[torch.Tensor, dict[str, Any]]:
    """verl's whole actor loss, in which the policy loss learns where the prefix is, plus sums by segment.

    Args:
        config: verl's ActorConfig.
        model_output: nested `log_probs` over prompt and response.
        data: the micro-batch; carries `prefix_mask`, nested like `response_mask`.
        settings: `algorithm.soup`.
    """
    from verl.utils.metric import AggregationType, Metric
    from verl.workers.utils.losses import ppo_loss
    from verl.workers.utils.padding import no_padding_2_padding

    rows = data.select("old_log_probs", "advantages", "response_mask", "prefix_mask").to_padded_tensor()
    prefix = rows["prefix_mask"].bool()
    token = _micro_batch.set((settings, prefix))
    try:
        loss, metrics = ppo_loss(config, model_output, data, dp_group)
    finally:
        _micro_batch.reset(token)
    if config.policy_loss.get("loss_mode", "vanilla") not in ("soup", "vanilla"):
        return loss, metrics  # another loss, of which these sums would not be true
    with torch.no_grad():
        log_prob = no_padding_2_padding(model_output["log_probs"], data).detach()
        clip = clip_ranges(settings, config)
        weights = settings.shaping_gamma, settings.nll_coefficient
        inputs = LossInputs(log_prob, rows["old_log_probs"], rows["advantages"], prefix, clip, *weights)
        sums = loss_sums(inputs, RATIOS[settings.ratio].loss(inputs), rows["response_mask"])
    # verl adds up micro-batches, but takes the mean of the ranks.
    ranks = data["dp_size"]
    metrics.update({key: Metric(value=value * ranks, aggregation=AggregationType.SUM) for key, value in sums.items()})
    return loss, metrics
