"""In which groups demonstrations count (`algorithm.soup.demonstrations.gate`): read off the step's own samples."""

from collections import Counter
from collections.abc import Hashable
from dataclasses import replace

import torch

from recipe.soup.algorithm.batch import TrainRows


def open_gates(rows: TrainRows, most: int) -> dict[Hashable, bool]:
    """Say for each prompt whether at most so many of its samples without a demonstration succeeded (a reward above 0).

    Args:
        most: successes; 0 for prompts that the policy does not solve.
    """
    own = rows.response_mask.any(dim=1) & ~rows.is_demonstration.any(dim=1)
    successes: dict[Hashable, int] = {}
    for uid, counts in zip(rows.uids, (own & (rows.rewards > 0)).tolist(), strict=True):
        successes[uid] = successes.get(uid, 0) + counts
    return {uid: count <= most for uid, count in successes.items()}


def samples_that_count(rows: TrainRows, gate: str, gate_successes: int) -> torch.Tensor:
    """Choose the samples that enter loss and baseline.

    `unsolved`: a demonstration counts where no sample of the policy's own succeeded, beside these. `successes`: where
    at most `gate_successes` did, demonstrations count alone, and elsewhere the others (HPT). A prompt without a
    demonstration keeps its samples.

    Returns:
        bool, (batch,).
    """
    shown = rows.is_demonstration.any(dim=1)
    samples = rows.response_mask.any(dim=1)
    if gate == "always":
        return samples
    is_open = open_gates(rows, 0 if gate == "unsolved" else gate_successes)
    opened = torch.tensor([is_open[uid] for uid in rows.uids])
    if gate == "unsolved":
        return samples & (~shown | opened)
    has_any = {uid for uid, demonstration in zip(rows.uids, shown.tolist(), strict=True) if demonstration}
    imitates = opened & torch.tensor([uid in has_any for uid in rows.uids])
    return samples & (shown == imitates)


def without(rows: TrainRows, kept: torch.Tensor) -> TrainRows:
    """The batch in which the others are rows that are no samples.

    Args:
        kept: bool, (batch,).
    """
    return replace(
        rows, response_mask=rows.response_mask & kept[:, None], is_historical=rows.is_historical & kept[:, None]
    )


def alone(rows: TrainRows) -> torch.Tensor:
    """The samples that are the only one of their prompt: nothing is left that they could be compared with.

    Returns:
        bool, (batch,).
    """
    samples = rows.response_mask.any(dim=1).tolist()
    sizes = Counter(uid for uid, counts in zip(rows.uids, samples, strict=True) if counts)
    return torch.tensor([counts and sizes[uid] == 1 for uid, counts in zip(rows.uids, samples, strict=True)])
