"""The metrics of a step of several updates, over all of them.

verl would merge them by words in their names, by which a difference ("minus") becomes a minimum and a count a mean.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F

from recipe.soup.algorithm.batch import TrainRows

COUNTS = ("soup/cost/", "soup/train/samples/")
LOST_SHARE = "soup/train/samples/lost_share"
WEIGHTS = {
    "soup/train/prefix/trained": "soup/train/prefix/tokens",
    "soup/train/wait/mean": "soup/train/samples/trained",
}
"""Means that no batch tells by itself, and what counts in them."""


def joined(updates: Sequence[TrainRows]) -> TrainRows:
    """Return the rows of all of a step's updates as one batch; shorter ones are filled up with zeros, masked out."""
    width = max(rows.response_mask.size(1) for rows in updates)

    def join(name: str) -> Any:
        values = [getattr(rows, name) for rows in updates]
        if name == "current_version":
            return values[0]
        if name == "uids":
            return [uid for uids in values for uid in uids]
        return torch.cat([F.pad(v, (0, width - v.size(1))) if v.dim() > 1 else v for v in values])

    return TrainRows(**{field.name: join(field.name) for field in fields(TrainRows)})


def mean_sums(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of `loss_sums` over a step's updates, each a mean over mini-batches of one size."""
    return {key: sum(sums[key] for sums in updates) / len(updates) for key in updates[0]}


def merged(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Merge what each update told beside its rows and its loss.

    Counts add up, of a maximum and of what is broken (1 or 0) the largest stays, and what is kept for later steps is
    told as the last update left it.
    """
    result = dict(updates[-1])
    for key in result:
        values = [update[key] for update in updates]
        if key.startswith(COUNTS):
            result[key] = sum(values)
        elif key.startswith("soup/train/broken/") or key.endswith("/max"):
            result[key] = max(values)
        elif key in WEIGHTS:
            weights = [update[WEIGHTS[key]] for update in updates]
            total = sum(weights)
            result[key] = sum(w * v for w, v in zip(weights, values, strict=True)) / total if total else 0.0
    if LOST_SHARE in result:
        asked, arrived = (result[f"soup/train/samples/{name}"] for name in ("asked", "arrived"))
        result[LOST_SHARE] = (asked - arrived) / asked if asked else 0.0
    return result
