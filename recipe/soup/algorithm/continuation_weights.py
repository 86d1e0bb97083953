"""What the tokens behind a stale prefix weigh (`algorithm.soup.continuation_weight`): decided once for a batch.

The current policy samples the continuation, so that each of its tokens has a ratio of 1. What it continues, though, is
drawn by the historical policy, as often as that one would write it. A weight of each sample corrects for this.
"""

from collections.abc import Callable

import torch

from recipe.soup.algorithm.batch import TrainRows
from recipe.soup.algorithm.losses.clipped import LOG_RATIO_LIMIT

LogWeight = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From log pi_old - log mu, 0 off the prefix, and where the prefix is, to log-weights (batch,)."""


def log_product(log_ratio: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
    """Product of the prefix's ratios, with which the continuation's gradient is unbiased (importance sampling)."""
    return log_ratio.sum(dim=1)


def log_min(log_ratio: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
    """The smallest ratio of the prefix in the product's place (MinPRO, arXiv 2601.22718)."""
    least = log_ratio.masked_fill(~prefix, torch.inf).amin(dim=1)
    return torch.where(prefix.any(dim=1), least, 0.0)


LOG_WEIGHTS: dict[str, LogWeight] = {
    "product": log_product,
    "min": log_min,
    "window": log_product,
    "whole": log_product,
}
"""By `continuation_weight`."""


def continuation_weights(
    log_ratio: torch.Tensor, prefix: torch.Tensor, kind: str, window: tuple[float, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weigh what comes after each prefix; 1 where there is none, or where both policies agree on it.

    Args:
        log_ratio: (batch, response_length), log pi_old - log mu at the start of the update; anything off the prefix.
        prefix: bool, (batch, response_length).
        kind: a name in `LOG_WEIGHTS`.
        window: for `window`, how far below and above 0 the log-weight of a prefix of k tokens may be, times sqrt(k)
            (the window of CTPO, arXiv 2605.07331, around its running product).

    Returns:
        weights (batch,), and bool (batch,), those that a bound has cut.
    """
    own = torch.where(prefix, log_ratio.double(), 0.0)
    exact = LOG_WEIGHTS[kind](own, prefix)
    held = exact.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if kind == "window":
        # An infinite bound times sqrt(0) would be no number; a row without a prefix has 0 in any window.
        width = prefix.sum(dim=1).clamp(min=1).double().sqrt()
        held = held.clamp(-window[0] * width, window[1] * width)
    return held.exp().to(log_ratio.dtype), held != exact


def others_on_the_prefix(log_ratio: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
    """Weigh each prefix token by the ratios of the others, for `whole`: with its own it weighs the product of all.

    A response's reward belongs to all of its tokens, so that one which the historical policy drew is paid for as often
    as that one writes what stands before *and* behind it (importance sampling of the whole prefix).

    Args:
        log_ratio, prefix: as of `continuation_weights`.

    Returns:
        (batch, response_length), 1 off the prefix.
    """
    own = torch.where(prefix, log_ratio.double(), 0.0)
    others = (own.sum(dim=1, keepdim=True) - own).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.where(prefix, others.exp(), 1.0).to(log_ratio.dtype)


def continuation_metrics(rows: TrainRows, kind: str, window: tuple[float, float]) -> dict[str, float]:
    """What the weights of a batch are, over the samples that have a prefix and a continuation."""
    log_ratio = rows.current_log_probs - rows.behavior_log_probs
    weights, held = continuation_weights(log_ratio, rows.is_historical, kind, window)
    continued = rows.is_historical.any(dim=1) & (rows.response_mask & ~rows.is_historical).any(dim=1)
    chosen, name = weights[continued].double(), "soup/train/continuation/weight"
    return {
        f"{name}/mean": chosen.mean().item() if len(chosen) else 0.0,
        f"{name}/max": chosen.max().item() if len(chosen) else 0.0,
        f"{name}/clipped": held[continued].double().mean().item() if len(chosen) else 0.0,
    }
