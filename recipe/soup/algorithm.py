"""SOUP's names in verl's registries: the advantage estimator and the policy loss `soup`, and the worker's loss.

verl imports this module right after `verl.trainer.ppo.core_algos`, in every process that computes a loss.
"""

from typing import Any

import numpy as np
import torch
from verl.trainer.ppo.core_algos import (
    compute_grpo_outcome_advantage,
    compute_policy_loss_vanilla,
    register_adv_est,
    register_policy_loss,
)

from recipe.soup.metrics import loss_sums


@register_adv_est("soup")
def compute_soup_advantage(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, index: np.ndarray, config: Any, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """GRPO's advantage over one group per prompt, mixed and pure samples together (our choice; the paper is silent).

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


@register_policy_loss("soup")
def compute_soup_policy_loss(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """verl's clipped token loss. The old log-probs that enter it are the behaviour policy's (`ratios.py`)."""
    return compute_policy_loss_vanilla(*args, **kwargs)


def soup_loss(
    config: Any, model_output: dict[str, torch.Tensor], data: Any, dp_group: Any = None
) -> tuple[torch.Tensor, dict[str, Any]]:
    """verl's whole actor loss, unchanged, plus sums by segment for the trainer's metrics.

    Args:
        config: verl's ActorConfig.
        model_output: nested `log_probs` over prompt and response.
        data: the micro-batch; carries `prefix_mask`, nested like `response_mask`.
    """
    from verl.utils.metric import AggregationType, Metric
    from verl.workers.utils.losses import ppo_loss
    from verl.workers.utils.padding import no_padding_2_padding

    loss, metrics = ppo_loss(config, model_output, data, dp_group)
    rows = data.select("old_log_probs", "advantages", "response_mask", "prefix_mask").to_padded_tensor()
    sums = loss_sums(
        log_prob=no_padding_2_padding(model_output["log_probs"], data),
        old_log_prob=rows["old_log_probs"],
        advantages=rows["advantages"],
        response_mask=rows["response_mask"],
        prefix=rows["prefix_mask"].bool(),
        clip_low=config.clip_ratio_low if config.clip_ratio_low is not None else config.clip_ratio,
        clip_high=config.clip_ratio_high if config.clip_ratio_high is not None else config.clip_ratio,
    )
    metrics.update({key: Metric(value=value, aggregation=AggregationType.SUM) for key, value in sums.items()})
    return loss, metrics
