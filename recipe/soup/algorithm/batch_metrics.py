"""What happened to prefix and continuation in one training batch.

Everything here is confounded by mixing and says so in its name (`soup/train/...`); claims about entropy, accuracy and
pass@k come from unmixed validation. The keys never depend on the data: an empty segment reports zeros and its count.
"""

import math
import re
from collections import defaultdict
from collections.abc import Hashable, Sequence

import torch

from recipe.soup.algorithm.batch import NOBODY, TrainRows
from recipe.soup.algorithm.gates import samples_that_count
from recipe.soup.algorithm.losses.clipped import LOG_RATIO_LIMIT

NEEDS_FORWARD = re.compile("at_start|drift|engine_mismatch|entropy")
"""Metrics that compare with, or come from, the trainer's log-probs before the update."""


def _mean(values: torch.Tensor) -> float:
    return values.double().mean().item() if values.numel() else 0.0


def _max(values: torch.Tensor) -> float:
    return values.max().item() if values.numel() else 0.0


def _min(values: torch.Tensor) -> float:
    return values.min().item() if values.numel() else 0.0


def train_metrics(rows: TrainRows) -> dict[str, float]:
    """Segment metrics at the start of the update, before any gradient step."""
    samples = rows.response_mask.any(dim=1)
    mixed = rows.is_prefix.any(dim=1)
    pure = samples & ~mixed
    continuation = rows.response_mask & ~rows.is_prefix
    prefix_lengths = rows.is_historical.sum(dim=1)[rows.is_historical.any(dim=1)]
    lags = (rows.current_version - rows.policy_versions)[rows.is_historical & (rows.policy_versions >= 0)]
    log_ratio = rows.current_log_probs - rows.behavior_log_probs
    prefix_ratio = log_ratio[rows.is_historical].exp()
    distance = divergence(log_ratio[rows.is_historical])
    mismatch = log_ratio[continuation].abs()
    reward_mixed, reward_pure = _mean(rows.rewards[mixed]), _mean(rows.rewards[pure])
    both = bool(mixed.any() and pure.any())
    return {
        "soup/train/mixed/samples": float(mixed.sum()),
        "soup/train/mixed/share": _mean(mixed[samples]),
        "soup/train/mixed/without_continuation": float((mixed & ~continuation.any(dim=1)).sum()),
        "soup/train/prefix/tokens": float(rows.is_historical.sum()),
        "soup/train/prefix/share": _mean(rows.is_historical[rows.response_mask]),
        "soup/train/prefix/length/mean": _mean(prefix_lengths),
        "soup/train/prefix/length/max": float(_max(prefix_lengths)),
        "soup/train/prefix/lag/mean": _mean(lags),
        "soup/train/prefix/lag/max": float(_max(lags)),
        "soup/train/prefix/ratio_at_start/mean": _mean(prefix_ratio),
        "soup/train/prefix/ratio_at_start/min": _min(prefix_ratio),
        "soup/train/prefix/ratio_at_start/max": _max(prefix_ratio),
        **{f"soup/train/prefix/{name}_at_start": value for name, value in distance.items()},
        "soup/train/prefix/entropy": _mean(rows.entropy[rows.is_historical]),
        "soup/train/tool_tokens": float(((rows.policy_versions == NOBODY) & ~rows.response_mask)[samples].sum()),
        "soup/train/continuation/tokens": float(continuation.sum()),
        "soup/train/continuation/entropy": _mean(rows.entropy[continuation]),
        # Between rollout engine and trainer, on tokens of the current version only: elsewhere age would show.
        "soup/train/continuation/engine_mismatch/mean": _mean(mismatch),
        "soup/train/continuation/engine_mismatch/max": _max(mismatch),
        "soup/train/reward/mixed": reward_mixed,
        "soup/train/reward/pure": reward_pure,
        "soup/train/reward/mixed_minus_pure": reward_mixed - reward_pure if both else 0.0,
        **entropy_by_position(rows),
        "soup/train/groups_with_signal": groups_with_signal(rows.rewards[samples], _select(rows.uids, samples)),
    }


def drift_metrics(rows: TrainRows, by_trainer: bool) -> dict[str, float]:
    """How far the policy has moved from the one that sampled the prefixes: |log pi - log mu| of a token, in nats.

    Args:
        by_trainer: whether the trainer computed log mu. If the rollout engine did, what engine and trainer round
            differently is in it as well, and in the metric's name; on the continuation that stands alone
            (`engine_mismatch`).
    """
    moved = (rows.current_log_probs - rows.behavior_log_probs)[rows.is_historical].abs()
    name = "soup/train/prefix/drift" if by_trainer else "soup/train/prefix/drift_and_mismatch"
    return {f"{name}/mean": _mean(moved), f"{name}/max": _max(moved)}


def mismatch_metrics(mismatch: Sequence[float]) -> dict[str, float]:
    """How far rollout engine and trainer are apart on the prefixes that were sampled in this step.

    Args:
        mismatch: |log-prob of the engine - log-prob of the trainer| of each token, in nats.
    """
    name = "soup/prefix/engine_mismatch"
    mean = sum(mismatch) / len(mismatch) if mismatch else 0.0
    return {f"{name}/mean": float(mean), f"{name}/max": float(max(mismatch, default=0.0))}


def demonstration_metrics(rows: TrainRows, gate: str, gate_successes: int) -> dict[str, float]:
    """What the policy makes of demonstrations, before the update, and in how many groups they count.

    Returns:
        with `nll` the mean of -log pi of their tokens, in nats; `gate_open` is a share of the prompts that have one.
    """
    shown = rows.is_demonstration
    samples = shown.any(dim=1)
    counted = samples_that_count(rows, gate, gate_successes)
    groups = set(_select(rows.uids, samples))
    name = "soup/train/demonstration"
    return {
        f"{name}/samples": float(samples.sum()),
        f"{name}/tokens": float(shown.sum()),
        f"{name}/share": _mean(shown[rows.response_mask]),
        f"{name}/reward": _mean(rows.rewards[samples]),
        f"{name}/nll": _mean(-rows.current_log_probs[shown]),
        f"{name}/entropy": _mean(rows.entropy[shown]),
        f"{name}/gate_open": len(set(_select(rows.uids, samples & counted))) / len(groups) if groups else 0.0,
        f"{name}/left_out": float((rows.response_mask.any(dim=1) & ~counted).sum()),
    }


def divergence(log_ratio: torch.Tensor) -> dict[str, float]:
    """How far two policies are apart on the tokens that one of them sampled.

    Args:
        log_ratio: (tokens,), log pi - log mu on tokens that mu sampled.

    Returns:
        Schulman's estimators `kl_k1` and `kl_k3` of KL(mu || pi), in nats, and `effective_sample_size` of weights
        pi/mu as a share of the tokens, in (0, 1]; zeros without tokens.
    """
    log_ratio = log_ratio.double().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    squares = (ratio**2).sum().item()
    return {
        "kl_k1": _mean(-log_ratio),
        "kl_k3": _mean(ratio - 1 - log_ratio),
        "effective_sample_size": ratio.sum().item() ** 2 / (squares * len(ratio)) if squares else 0.0,
    }


def entropy_by_position(rows: TrainRows) -> dict[str, float]:
    """Entropy in nats per token in each quarter of the sampled tokens, mixed and pure samples together."""
    lengths = rows.response_mask.sum(dim=1, keepdim=True).clamp(min=1)
    # Not by place: a tool may have written something in between.
    quarter = 4 * (rows.response_mask.cumsum(dim=1) - 1) // lengths
    return {
        f"soup/train/entropy/quarter_{i + 1}": _mean(rows.entropy[rows.response_mask & (quarter == i)])
        for i in range(4)
    }


LAG_BUCKETS = ((1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63), (64, None))
"""First and last lag of each, in updates."""


def lag_metrics(rows: TrainRows) -> dict[str, float]:
    """Prefix tokens by age, for runs in which ages differ."""
    lags = rows.current_version - rows.policy_versions
    own = rows.is_historical & (rows.policy_versions >= 0)
    metrics: dict[str, float] = {}
    for first, last in LAG_BUCKETS:
        name = f"soup/train/lag_{first}" + ("" if last == first else "_or_more" if last is None else f"_to_{last}")
        bucket = own & (lags >= first) & ((lags <= last) if last is not None else True)
        log_ratio = (rows.current_log_probs - rows.behavior_log_probs)[bucket]
        metrics[f"{name}/tokens"] = float(bucket.sum())
        metrics[f"{name}/ratio_at_start"] = _mean(log_ratio.exp())
        metrics |= {f"{name}/{key}_at_start": value for key, value in divergence(log_ratio).items()}
    return metrics


def staleness_metrics(rows: TrainRows) -> dict[str, float]:
    """Age of all tokens that are trained on, the current version's with 0: prefixes, and what a rollout ahead adds."""
    sampled = rows.response_mask & (rows.policy_versions >= 0)
    ages = (rows.current_version - rows.policy_versions)[sampled]
    return {"soup/train/staleness/mean": _mean(ages), "soup/train/staleness/max": float(_max(ages))}


def wait_metrics(waits: Sequence[int]) -> dict[str, float]:
    """For how many steps samples were under way; a prefix that was `lag` old when its prompt was sent out is older.

    Args:
        waits: of each sample, 0 if the step that trains on it sent it out.
    """
    mean = sum(waits) / len(waits) if waits else 0.0
    return {"soup/train/wait/mean": mean, "soup/train/wait/max": float(max(waits, default=0))}


def groups_with_signal(rewards: torch.Tensor, uids: Sequence[Hashable]) -> float:
    """Share of groups whose samples do not all have the same reward, hence with a gradient; 0 without groups.

    A reward that is not finite tells nothing.
    """
    groups: dict[Hashable, set[float]] = defaultdict(set)
    for uid, reward in zip(uids, rewards.tolist(), strict=True):
        groups[uid] |= {reward} if math.isfinite(reward) else set()
    return sum(len(values) > 1 for values in groups.values()) / len(groups) if groups else 0.0


def _select(items: Sequence[Hashable], mask: torch.Tensor) -> list[Hashable]:
    return [item for item, keep in zip(items, mask.tolist(), strict=True) if keep]
