"""Behaviour log-probs by the trainer (`behavior_log_probs=trainer`), while it holds the weights that sampled.

One forward pass more over prompt and prefix; what differs between rollout engine and trainer leaves every ratio.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from uuid import uuid4

import numpy as np
import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size
from verl.workers.utils.padding import response_from_nested

from recipe.soup.prefixes.requests import SampledPrefix

PARTITION = "soup_prefixes"


def recompute(
    seeds: Sequence[SampledPrefix],
    worker_group: Any,
    ranks: int,
    micro_batch_size: int | None,
    temperature: float,
    eos_token_id: int,
) -> tuple[list[SampledPrefix], list[float]]:
    """The same prefixes with the trainer's log-probs.

    Args:
        seeds: sampled by the version that the trainer holds; `prompt_ids` must be there.
        worker_group: verl's actor workers.
        ranks: data-parallel ranks, of which each gets as many rows.
        micro_batch_size: at most so many rows at once, or None if verl forms batches by their tokens.
        temperature: of the rollout.

    Returns:
        the seeds, and |trainer - rollout| of each of their tokens, in nats.
    """
    filled = [seed for seed in seeds if len(seed.prefix)]
    if not filled:
        return list(seeds), []
    keys = [f"{uuid4().hex}_0_0" for _ in filled]
    rows = [_row(seed) for seed in filled]
    fields: dict[str, Any] = {
        name: torch.nested.as_nested_tensor([row[name] for row in rows], layout=torch.jagged) for name in rows[0]
    }
    tags = [{"seq_len": len(row["input_ids"]), "is_padding": False} for row in rows]
    batch = tq.kv_batch_put(
        keys=keys, partition_id=PARTITION, fields=TensorDict(fields, batch_size=len(keys)), tags=tags
    )
    batch = KVBatchMeta(partition_id=PARTITION, keys=keys, tags=tags, extra_info={})
    try:
        # verl wants full micro-batches; the number of prefixes is any.
        per_rank = -(-len(keys) // ranks)
        micro_batches = -(-per_rank // (micro_batch_size or per_rank))
        micro_batch_size = -(-per_rank // micro_batches) if micro_batch_size else 1
        batch = upsample_batch_to_divisible_size(batch, ranks * micro_batch_size, eos_token_id)
        batch.extra_info = {"calculate_entropy": False, "compute_loss": False, "temperature": temperature}
        batch.extra_info["micro_batch_size_per_gpu"] = micro_batch_size
        worker_group.compute_log_prob(batch)
        data = tq.kv_batch_get(keys=keys, partition_id=PARTITION, select_fields=["log_probs", "response_mask"])
        log_probs = response_from_nested(data["log_probs"], data["response_mask"]).unbind()
    finally:
        tq.kv_clear(keys=batch.keys, partition_id=PARTITION)
    recomputed = {
        # numpy knows no bfloat16, the type in which verl's workers answer if they compute in it.
        id(seed): replace(seed.prefix, log_probs=values[: len(seed.prefix)].float().numpy().copy())
        for seed, values in zip(filled, log_probs, strict=True)
    }
    mismatch = [abs(recomputed[id(seed)].log_probs - seed.prefix.log_probs) for seed in filled]
    return (
        [replace(seed, prefix=recomputed.get(id(seed), seed.prefix), prompt_ids=None) for seed in seeds],
        np.concatenate(mismatch).tolist(),
    )


def _row(seed: SampledPrefix) -> dict[str, torch.Tensor]:
    assert seed.prompt_ids is not None
    prompts = torch.tensor(seed.prompt_ids, dtype=torch.int64)
    responses = torch.tensor(seed.prefix.token_ids, dtype=torch.int64)
    input_ids = torch.cat([prompts, responses])
    return {
        "prompts": prompts,
        "responses": responses,
        "input_ids": input_ids,
        "position_ids": torch.arange(len(input_ids)),
        "response_mask": torch.ones_like(responses),
        "loss_mask": torch.ones_like(responses),
    }
