"""Two policy losses for old samples that verl has no name for: `actor.policy_loss.loss_mode` `ctpo` and `m2po`.

Importing this module registers them. Both take ratios against `old_log_prob`, whichever policy that is on each token,
and have the constants that were published: verl's config has no keys for them. Tensors are (batch, response_length).
"""

from typing import Any

import torch
from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss

LOG_RATIO_LIMIT = 20.0
"""As in verl: keeps exp() finite."""
CTPO_LOW, CTPO_HIGH, CTPO_DUAL = 0.025, 0.05, 0.05
"""In log space, each times sqrt(t) (the authors' `ctpo.sh`)."""
M2PO_BUDGET = 0.04
"""Of the harmful tokens' mean squared log-ratio (M2PO's scripts)."""

Held = tuple[torch.Tensor, torch.Tensor]
"""Bool: where a clip leaves no gradient, and where the dual one does."""


def ctpo(
    log_prob: torch.Tensor, old_log_prob: torch.Tensor, advantages: torch.Tensor, response_mask: torch.Tensor
) -> tuple[torch.Tensor, Held]:
    """PPO's clipped objective on the running product of ratios: it weighs a token by how its prefix came about.

    c_t = prod_{i <= t} pi_theta / pi_old, with gradient through token t only; clipped in log space to
    [-low sqrt(t), high sqrt(t)], and for A < 0 held at exp(dual sqrt(t)). CTPO, arXiv 2605.07331, by its authors' code.

    Returns:
        losses of each token, to be minimised.
    """
    mask = response_mask.to(log_prob.dtype)
    log_ratio = (log_prob - old_log_prob).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).detach() * mask
    running = log_ratio.cumsum(dim=-1).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    log_c = running + log_prob - log_prob.detach()
    root = mask.cumsum(dim=-1).clamp(min=1).sqrt()
    free = -advantages * log_c.exp()
    clipped = -advantages * log_c.clamp(-CTPO_LOW * root, CTPO_HIGH * root).exp()
    most = -advantages * (CTPO_DUAL * root).exp()
    single, negative = torch.maximum(free, clipped), advantages < 0
    losses = torch.where(negative, torch.minimum(most, single), single)
    return losses, (clipped > free, (single > most) & negative)


def m2po(
    log_prob: torch.Tensor, old_log_prob: torch.Tensor, advantages: torch.Tensor, response_mask: torch.Tensor
) -> tuple[torch.Tensor, Held]:
    """PPO's clipped objective with the one bound that keeps the second moment of harmful tokens within a budget.

    Harmful is a token that the update would push further away: A > 0 and a ratio above 1, or A < 0 and below. Their
    ratios are clipped to [exp(-tau), exp(tau)], where the mean of min((log ratio)^2, tau^2) over them is the budget;
    within it nothing is clipped. M2PO, arXiv 2510.01161, by its authors' code: under the policy that is being updated,
    in each micro-batch, so that it depends on how a batch is split. (For tau their code
    takes the next smaller |log ratio| that there is in the micro-batch.)

    Returns:
        losses of each token, to be minimised.
    """
    log_ratio = (log_prob - old_log_prob).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    harmful = (log_ratio.detach() * advantages > 0) & response_mask.bool()
    tau = second_moment_bound(log_ratio.detach()[harmful] ** 2, M2PO_BUDGET)
    free = -advantages * log_ratio.exp()
    clipped = -advantages * log_ratio.clamp(-tau, tau).exp()
    return torch.maximum(free, clipped), (clipped > free, torch.zeros_like(harmful))


def second_moment_bound(squares: torch.Tensor, budget: float) -> float:
    """Find tau with mean(min(squares, tau^2)) = budget; inf if the mean is within the budget as it is.

    Args:
        squares: (tokens,), squared log-ratios.
    """
    squares = squares.double().sort().values
    if not len(squares) or squares.mean() <= budget:
        return torch.inf
    count = torch.arange(len(squares), 0, -1, device=squares.device)  # of those from here on
    before = squares.cumsum(0) - squares
    # The first one at which capping all from here on reaches the budget: the bound lies below it.
    first = int((before + squares * count >= budget * len(squares)).nonzero()[0])
    return float((budget * len(squares) - before[first]) / count[first]) ** 0.5


LOSSES = {"ctpo": ctpo, "m2po": m2po}
"""By `loss_mode`."""


def clip_metrics(
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    held: torch.Tensor,
    dual: torch.Tensor,
    response_mask: torch.Tensor,
) -> dict[str, float]:
    """What verl tells of a clipped loss, under its names; all tensors are (batch, response_length).

    Args:
        held: bool, tokens whose ratio is held at a bound.
        dual: bool, those that verl's dual clip holds.
    """
    mask = response_mask.bool()
    count = mask.sum().clamp(min=1).item()
    return {
        "actor/pg_clipfrac": (held & mask).sum().item() / count,
        "actor/ppo_kl": ((old_log_prob - log_prob).detach() * mask).sum().item() / count,
        "actor/pg_clipfrac_lower": (dual & mask).sum().item() / count,
    }


def _register(name: str) -> None:
    @register_policy_loss(name)
    def compute(
        old_log_prob: torch.Tensor,
        log_prob: torch.Tensor,
        advantages: torch.Tensor,
        response_mask: torch.Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        losses, (held, dual) = LOSSES[name](log_prob, old_log_prob, advantages, response_mask)
        losses = losses if rollout_is_weights is None else losses * rollout_is_weights
        loss = agg_loss(
            loss_mat=losses, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info
        )
        return loss, clip_metrics(log_prob, old_log_prob, held, dual, response_mask)


for _name in LOSSES:
    _register(_name)
