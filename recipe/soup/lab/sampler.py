"""Batched sampling with a key-value cache, in plain torch and transformers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Answer:
    """What verl's TokenOutput is to a prefix source.

    Attributes:
        token_ids: sampled tokens; the last one is the end token if the model ended by itself.
        log_probs: of each, natural log, at the sampling temperature.
        extra_fields: `global_steps`, the version that sampled.
    """

    token_ids: list[int]
    log_probs: list[float]
    extra_fields: dict[str, Any]


Sampler = Callable[..., list[Answer]]
"""`sample` with its arguments, or `StaticSampler`."""


@torch.no_grad()
def sample(
    model: Any,
    prompts: Sequence[list[int]],
    max_tokens: Sequence[int],
    version: int,
    temperature: float,
    eos_token_id: int,
    generator: torch.Generator,
) -> list[Answer]:
    """One answer to each prompt, all of them at once.

    Args:
        prompts: token ids, each at least one.
        max_tokens: for each prompt, at least 1.
        version: of the model's weights.
        generator: where the randomness comes from.
    """
    if not prompts:
        return []
    width = max(map(len, prompts))
    # Padded on the left, so that all rows go on at the same column.
    ids = torch.tensor([[eos_token_id] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    limits = torch.tensor(max_tokens)
    alive = torch.ones(len(prompts), dtype=torch.bool)
    tokens, values, lengths = [], [], torch.zeros(len(prompts), dtype=torch.long)
    cache, positions = None, (mask.cumsum(dim=1) - 1).clamp(min=0)
    for step in range(int(limits.max())):
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        cache = output.past_key_values
        log_probs = (output.logits[:, -1].float() / temperature).log_softmax(dim=-1)
        chosen = torch.multinomial(log_probs.exp(), 1, generator=generator)
        tokens.append(chosen[:, 0])
        values.append(log_probs.gather(1, chosen)[:, 0])
        lengths += alive
        alive &= (chosen[:, 0] != eos_token_id) & (limits > step + 1)
        if not alive.any():
            break
        ids, positions = chosen, positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(chosen)], dim=1)
    all_tokens, all_values = torch.stack(tokens, dim=1).tolist(), torch.stack(values, dim=1).tolist()
    return [
        Answer(row[:length], probs[:length], {"global_steps": version})
        for row, probs, length in zip(all_tokens, all_values, lengths.tolist(), strict=True)
    ]
