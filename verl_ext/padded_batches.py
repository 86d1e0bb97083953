"""Dynamic micro-batches without packing: at most as many tokens as asked for, with their padding.

verl fills a micro-batch up to `ppo_max_token_len_per_gpu` tokens, and counts the samples' own. Where its FSDP engine
does not pack (`use_remove_padding=false`, as without flash-attn), it pads a micro-batch's samples to the longest, and
computes the logits of padding as well: with the lengths that responses have, two to six times the limit, which no GPU
has room for. Where a micro-batch would be larger than asked for, all are formed anew from samples of similar lengths.
How a mini-batch is cut changes neither loss nor gradient.

verl imports this module right after its FSDP engine.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name
from verl.workers.engine.fsdp import transformer_impl

Parts = list[list[int]]
"""The samples of each micro-batch."""


def padded(part: Sequence[int], lengths: Sequence[int]) -> int:
    """Tokens of a micro-batch when all its samples are as long as the longest."""
    return len(part) * max(lengths[i] for i in part)


def of_similar_lengths(lengths: Sequence[int], limit: int, at_least: int = 1) -> Parts:
    """Cut samples into micro-batches of at most `limit` padded tokens: as few as there can be, but `at_least` so many.

    Args:
        lengths: tokens of each sample, none above `limit`.
        at_least: not above the number of samples.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    parts: Parts = []
    while longest_first:
        fit = max(limit // lengths[longest_first[0]], 1)
        parts.append(longest_first[:fit])
        longest_first = longest_first[fit:]
    while len(parts) < at_least:
        largest = max((part for part in parts if len(part) > 1), key=lambda part: padded(part, lengths))
        parts.remove(largest)
        parts += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
    return parts


def _most(number: int, group: Any) -> int:
    """The largest of all data-parallel ranks' numbers: FSDP's ranks must make as many passes as each other."""
    most = torch.tensor(number, device=get_device_name())
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX, group=group)
    return int(most)


def bounded(prepare: Callable[..., Any]) -> Callable[..., tuple[list[Any], Parts | None]]:
    """verl's `prepare_micro_batches`, with a limit that holds for padding, too."""

    @wraps(prepare)
    def prepared(data: Any, dp_group: Any = None, **options: Any) -> tuple[list[Any], Parts | None]:
        micro_batches, parts = prepare(data, dp_group=dp_group, **options)
        packs = tu.get_non_tensor_data(data=data, key="use_remove_padding", default=True)
        if packs or parts is None:  # fixed sizes are the user's own
            return micro_batches, parts
        lengths = data["input_ids"].offsets().diff().tolist()
        limit: Any = tu.get_non_tensor_data(data=data, key="max_token_len_per_gpu", default=None)
        if _most(max(padded(part, lengths) for part in parts), dp_group) <= limit:
            return micro_batches, parts
        count = _most(len(of_similar_lengths(lengths, limit)), dp_group)
        parts = of_similar_lengths(lengths, limit, at_least=count)
        return [tu.index_select_tensor_dict(data, part) for part in parts], parts

    return prepared


engine: Any = transformer_impl
engine.prepare_micro_batches = bounded(engine.prepare_micro_batches)
