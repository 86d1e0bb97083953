"""Which tokens have a gradient: decided once for a batch, before the update.

A threshold taken per micro-batch would depend on how the batch is split.
"""

import torch

from recipe.soup.algorithm.batch import TrainRows


def trained_prefix(
    rows: TrainRows, advantages: torch.Tensor, prefix_gradient: float, second_moment: float | None
) -> torch.Tensor:
    """Choose the prefix tokens that have a policy gradient.

    Args:
        advantages: (batch, response_length).
        prefix_gradient: share of the prefix tokens, those with the highest entropy first.
        second_moment: budget of the mean squared log-ratio; None: no budget.

    Returns:
        bool, (batch, response_length).
    """
    trained = rows.is_prefix.clone()
    if prefix_gradient < 1:
        trained &= highest_entropy(rows.entropy, rows.is_prefix, prefix_gradient)
    if second_moment is not None:
        log_ratio = rows.current_log_probs - rows.behavior_log_probs
        trained &= within_second_moment(log_ratio, advantages, rows.is_historical, second_moment)
    return trained


def highest_entropy(entropy: torch.Tensor, prefix: torch.Tensor, share: float) -> torch.Tensor:
    """The prefix tokens at which the current policy is least certain.

    Args:
        entropy: (batch, response_length), nats, under the current policy.
        prefix: bool, (batch, response_length).
        share: of the batch's prefix tokens, in [0, 1]; rounded to whole tokens.

    Returns:
        bool, (batch, response_length): the share of prefix tokens with the highest entropy. PrefixRL and Prefix
        Sampling: share 0.
    """
    kept = torch.zeros_like(prefix)
    order = entropy[prefix].argsort(descending=True, stable=True)
    chosen = torch.zeros_like(order, dtype=torch.bool)
    chosen[order[: round(share * len(order))]] = True
    kept[prefix] = chosen
    return kept


def within_second_moment(
    log_ratio: torch.Tensor, advantages: torch.Tensor, prefix: torch.Tensor, budget: float
) -> torch.Tensor:
    """M2PO's trust region on the prefix: tokens leave, the largest squared log-ratio first, until the mean fits.

    Only those can leave that the update would push further from the policy that sampled them, as with PPO's clip
    (our choice); the mean is over all prefix tokens that stay.

    Args:
        log_ratio: (batch, response_length), log pi_old - log mu, at the start of the update.
        advantages: (batch, response_length).
        prefix: bool, (batch, response_length).
        budget: of the mean of squared log-ratios, above 0; M2PO uses 0.04.

    Returns:
        bool, (batch, response_length): the prefix tokens that stay.
    """
    squares = log_ratio[prefix].double() ** 2
    leaving = (log_ratio * advantages)[prefix] > 0
    order = torch.where(leaving, squares, -1.0).argsort()  # those that must stay come first
    means = squares[order].cumsum(0) / torch.arange(1, len(order) + 1)
    removable = leaving[order]
    # From the largest down: everything behind the last position at which the mean fits.
    fits = (means <= budget) | ~removable
    last = int(fits.nonzero().max()) + 1 if fits.any() else 0
    stays = torch.zeros_like(leaving)
    stays[order[:last]] = True
    kept = torch.zeros_like(prefix)
    kept[prefix] = stays
    return kept


def behind_an_outlier(
    log_ratio: torch.Tensor, advantages: torch.Tensor, prefix: torch.Tensor, bounds: tuple[float, float]
) -> torch.Tensor:
    """Tokens of stale negatives: where A < 0, those behind the first prefix token whose ratio is out of bounds.

    From there on the current policy would hardly have gone this way, so that pushing it away teaches little (mu-GRPO,
    arXiv 2605.17570; taking the ratio at the start of the update is our choice, and so are any bounds).

    Args:
        log_ratio: (batch, response_length), log pi_old - log mu, at the start of the update.
        advantages: (batch, response_length).
        prefix: bool, (batch, response_length).
        bounds: of the ratio, the lower and the upper one.

    Returns:
        bool, (batch, response_length), in the prefix and behind it; the outlier itself is not among them.
    """
    ratio = log_ratio.double().exp()
    outside = prefix & ((ratio < bounds[0]) | (ratio > bounds[1]))
    return (outside.cumsum(dim=1) - outside.long() > 0) & (advantages < 0)
