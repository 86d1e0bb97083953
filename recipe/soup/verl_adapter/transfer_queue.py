"""Convert batches of TransferQueue, whose fields are nested tensors, to padded tensors and back."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.workers.utils.padding import response_to_nested

from recipe.soup.algorithm.batch import TrainRows, prefix_mask
from recipe.soup.names import VISIT_KEY
from recipe.soup.prefixes.finished import FinishedSample

EVICTED_FIELDS = [
    *("responses", "response_mask", "rollout_log_probs", "policy_versions"),
    *("rm_scores", "uid", "extra_fields", VISIT_KEY),
]
"""Of a group that is never trained on; no trainer has computed anything of it."""
TRAIN_FIELDS = [*EVICTED_FIELDS, "old_log_probs", "entropy"]


def fetch(batch: KVBatchMeta, fields: list[str]) -> Any:
    """Fields of a batch, as a TensorDict of nested tensors and stacks; fields that nobody stored are left out."""
    return tq.kv_batch_get(keys=batch.keys, partition_id=str(batch.partition_id), select_fields=fields)


def store(batch: KVBatchMeta, like: torch.Tensor, fields: dict[str, torch.Tensor]) -> None:
    """Write (batch, response_length) tensors back, each row as long as its row of `like`, the nested response mask."""
    nested = {key: response_to_nested(value, like) for key, value in fields.items()}
    tq.kv_batch_put(
        keys=batch.keys, partition_id=str(batch.partition_id), fields=TensorDict(nested, batch_size=len(batch))
    )


@contextmanager
def stored_in_float32(field: str) -> Iterator[None]:
    """Have verl store this field in float32 meanwhile, whatever type its workers compute in.

    TransferQueue keeps the type in which a field was put first, and refuses another. The log-probs that were recorded
    with prefixes are float32, so behind those of a trainer that computes in bfloat16 they could not be stored. (verl's
    `logprobs_from_logits_v2` answers in bfloat16 then; flash-attn's cross-entropy, where it is installed, in float32.)
    """
    put = tq.kv_batch_put

    def put_in_float32(*args: Any, fields: Any = None, **kwargs: Any) -> Any:
        if fields is not None and field in fields:
            fields[field] = fields[field].float()
        return put(*args, fields=fields, **kwargs)

    tq.kv_batch_put = put_in_float32
    try:
        yield
    finally:
        tq.kv_batch_put = put


def padded(nested: torch.Tensor, width: int) -> torch.Tensor:
    """Nested rows as (batch, width), right-padded with zeros.

    Rows of another length than the batch's responses (verl's padding rows keep the first sample's fields) are cut;
    they are masked out anyway.
    """
    rows = nested.to_padded_tensor(0)
    return F.pad(rows, (0, width - rows.size(1)))  # a negative pad cuts


def train_rows(data: Any, current_version: int) -> TrainRows:
    """Convert the fields of a batch to what the mathematics reads.

    Args:
        data: nested fields by verl's names: `responses`, `response_mask`, `policy_versions`, `rollout_log_probs`,
            `old_log_probs`, `rm_scores`, `uid`; and `entropy`, in whose place zeros stand where it is absent.
        current_version: version that the step rolled out with.

    Raises:
        RuntimeError: a newer version sampled a token, whose log-prob nobody has.
    """
    width = int(data["response_mask"].offsets().diff().max())
    response_mask = padded(data["response_mask"], width).bool()
    versions = padded(data["policy_versions"], width)
    if bool((versions > current_version)[response_mask].any()):
        newest = int(versions[response_mask].max())
        raise RuntimeError(f"Version {newest} sampled tokens of a step that has {current_version}: a bug of ours.")
    current_log_probs = padded(data["old_log_probs"], width)
    return TrainRows(
        response_mask=response_mask,
        response_ids=padded(data["responses"], width),
        is_historical=prefix_mask(versions, response_mask, current_version),
        policy_versions=versions,
        behavior_log_probs=padded(data["rollout_log_probs"], width),
        current_log_probs=current_log_probs,
        # verl's bypass_mode has no trainer forward, hence no entropy.
        entropy=padded(data["entropy"], width) if "entropy" in data else torch.zeros_like(current_log_probs),
        rewards=padded(data["rm_scores"], width).sum(dim=1),
        uids=list(data["uid"]),
        current_version=current_version,
    )


def finished_samples(data: Any, tags: list[dict], log_probs: torch.Tensor) -> Iterator[FinishedSample]:
    """The batch's samples without padding rows, each with its first turn.

    Args:
        data: fetched fields of the batch.
        log_probs: nested, each token's behaviour log-prob.
    """
    fields = (data["response_mask"], data["responses"], log_probs, data["policy_versions"], data["rm_scores"])
    entropies = data["entropy"].unbind() if "entropy" in data else [None] * len(tags)
    prompts = data["prompts"].unbind() if "prompts" in data else [None] * len(tags)
    rows = zip(tags, data[VISIT_KEY], entropies, prompts, *(nested.unbind() for nested in fields), strict=True)
    for tag, visit, entropy, prompt_ids, mask, token_ids, values, versions, scores in rows:
        if not tag.get("is_padding", False):
            prompt, ordinal = (int(getattr(visit, "data", visit)[name]) for name in ("prompt", "ordinal"))
            turn = slice(first_turn(mask))
            yield FinishedSample(
                prompt,
                ordinal,
                token_ids[turn].numpy(),
                values[turn].float().numpy(),
                versions[turn].numpy(),
                float(scores.sum()),
                None if entropy is None else entropy[turn].float().numpy(),
                None if prompt_ids is None else prompt_ids.numpy(),
            )


def first_turn(response_mask: torch.Tensor) -> int:
    """How many tokens a response's first turn has: those before the first that no policy sampled."""
    return int(response_mask.long().cumprod(0).sum())


def without_padding(batch: KVBatchMeta) -> KVBatchMeta:
    """The batch without the rows that verl adds to make its size divisible."""
    real = [i for i, tag in enumerate(batch.tags) if not tag.get("is_padding", False)]
    return KVBatchMeta(
        partition_id=batch.partition_id, keys=[batch.keys[i] for i in real], tags=[batch.tags[i] for i in real]
    )
