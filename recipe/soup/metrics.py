"""What happened to prefix and continuation in one training batch. Pure torch, imports no verl.

Everything here is confounded by mixing and says so in its name (`soup/train/...`); claims about entropy, accuracy and
pass@k come from unmixed validation. The keys never depend on the data: an empty segment reports zeros and its count.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TrainRows:
    """One training batch; (batch, response_length) unless stated. Rows that are no samples have an empty mask.

    Attributes:
        response_mask: bool, sampled tokens.
        prefix: bool, those older than the step's version.
        policy_versions: int, the version that sampled each token.
        behavior_log_probs: as recorded when each token was sampled.
        current_log_probs: the trainer's at the start of the update, before the splice.
        entropy: nats, under the current policy.
        rewards: (batch,), sum over the response.
        uids: (batch,), the group that each row belongs to.
        current_version: version that the step rolled out with.
    """

    response_mask: torch.Tensor
    prefix: torch.Tensor
    policy_versions: torch.Tensor
    behavior_log_probs: torch.Tensor
    current_log_probs: torch.Tensor
    entropy: torch.Tensor
    rewards: torch.Tensor
    uids: Sequence[Hashable]
    current_version: int


def _mean(values: torch.Tensor) -> float:
    return values.double().mean().item() if values.numel() else 0.0


def _max(values: torch.Tensor) -> float:
    return values.max().item() if values.numel() else 0.0


def _min(values: torch.Tensor) -> float:
    return values.min().item() if values.numel() else 0.0


def train_metrics(rows: TrainRows) -> dict[str, float]:
    """Segment metrics at the start of the update, before any gradient step."""
    samples = rows.response_mask.any(dim=1)
    mixed = rows.prefix.any(dim=1)
    pure = samples & ~mixed
    continuation = rows.response_mask & ~rows.prefix
    prefix_lengths = rows.prefix.sum(dim=1)[mixed]
    lags = (rows.current_version - rows.policy_versions)[rows.prefix & (rows.policy_versions >= 0)]
    log_ratio = rows.current_log_probs - rows.behavior_log_probs
    prefix_ratio = log_ratio[rows.prefix].exp()
    mismatch = log_ratio[continuation].abs()
    reward_mixed, reward_pure = _mean(rows.rewards[mixed]), _mean(rows.rewards[pure])
    both = bool(mixed.any() and pure.any())
    return {
        "soup/train/mixed/samples": float(mixed.sum()),
        "soup/train/mixed/share": _mean(mixed[samples]),
        "soup/train/mixed/without_continuation": float((mixed & ~continuation.any(dim=1)).sum()),
        "soup/train/prefix/tokens": float(rows.prefix.sum()),
        "soup/train/prefix/share": _mean(rows.prefix[rows.response_mask]),
        "soup/train/prefix/length/mean": _mean(prefix_lengths),
        "soup/train/prefix/length/max": float(_max(prefix_lengths)),
        "soup/train/prefix/lag/mean": _mean(lags),
        "soup/train/prefix/lag/max": float(_max(lags)),
        "soup/train/prefix/ratio_at_start/mean": _mean(prefix_ratio),
        "soup/train/prefix/ratio_at_start/min": _min(prefix_ratio),
        "soup/train/prefix/ratio_at_start/max": _max(prefix_ratio),
        "soup/train/prefix/entropy": _mean(rows.entropy[rows.prefix]),
        "soup/train/continuation/tokens": float(continuation.sum()),
        "soup/train/continuation/entropy": _mean(rows.entropy[continuation]),
        # Between rollout engine and trainer, on tokens of the current version only: elsewhere age would show.
        "soup/train/continuation/engine_mismatch/mean": _mean(mismatch),
        "soup/train/continuation/engine_mismatch/max": _max(mismatch),
        "soup/train/reward/mixed": reward_mixed,
        "soup/train/reward/pure": reward_pure,
        "soup/train/reward/mixed_minus_pure": reward_mixed - reward_pure if both else 0.0,
        "soup/train/groups_with_signal": groups_with_signal(rows.rewards[samples], _select(rows.uids, samples)),
    }


def groups_with_signal(rewards: torch.Tensor, uids: Sequence[Hashable]) -> float:
    """Share of groups whose samples do not all have the same reward, hence with a gradient; 0 without groups."""
    groups: dict[Hashable, set[float]] = defaultdict(set)
    for uid, reward in zip(uids, rewards.tolist(), strict=True):
        groups[uid].add(reward)
    return sum(len(values) > 1 for values in groups.values()) / len(groups) if groups else 0.0


def _select(items: Sequence[Hashable], mask: torch.Tensor) -> list[Hashable]:
    return [item for item, keep in zip(items, mask.tolist(), strict=True) if keep]


def loss_sums(
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    prefix: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> dict[str, float]:
    """Sums over one micro-batch, by segment; the trainer divides by the count once all have been added up.

    Args:
        log_prob, old_log_prob, advantages, response_mask: (batch, response_length), as in the loss.
        prefix: bool, (batch, response_length).
        clip_low, clip_high: the loss's clip range around 1.

    Returns:
        per segment: the number of tokens, the sum of their ratios, and how many of them the clip holds back.
    """
    ratio = (log_prob - old_log_prob).detach().exp()
    clipped = ((ratio > 1 + clip_high) & (advantages > 0)) | ((ratio < 1 - clip_low) & (advantages < 0))
    sums: dict[str, float] = {}
    for name, segment in (("prefix", prefix), ("continuation", ~prefix)):
        mask = segment & response_mask.bool()
        sums[f"soup/loss/{name}/tokens"] = float(mask.sum())
        sums[f"soup/loss/{name}/ratio"] = float(ratio[mask].double().sum())
        sums[f"soup/loss/{name}/clip_fraction"] = float(clipped[mask].sum())
    return sums


def means_of_loss_sums(sums: dict[str, float]) -> dict[str, float]:
    """Turn added-up `loss_sums` into means by token; the number of tokens (per mini-batch) stays."""
    means = {}
    for name in ("prefix", "continuation"):
        count = sums[f"soup/loss/{name}/tokens"]
        means[f"soup/loss/{name}/tokens"] = count
        for key in (f"soup/loss/{name}/ratio", f"soup/loss/{name}/clip_fraction"):
            means[key] = sums[key] / count if count else 0.0
    return means
