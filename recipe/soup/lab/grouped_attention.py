"""Attention of single tokens whose heads share keys and values (GQA), without copies of these for each head.

transformers repeats keys and values for each head wherever there is a mask, and samplers have one: three times the
memory traffic for SmolLM2, which has three heads to each. Heads that share keys can stand where several tokens would.
"""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "soup_grouped"


def grouped_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """torch's attention, as transformers' `sdpa`.

    Args:
        query: (batch, heads, tokens, size).
        key, value: (batch, heads that have their own, width, size).
        attention_mask: (batch, 1, tokens, width); True where a token is seen.

    Returns:
        (batch, tokens, heads, size).
    """
    batch, heads, tokens, size = query.shape
    if tokens > 1 or attention_mask is None or attention_mask.size(1) > 1:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **rest
        )
    shared = query.reshape(batch, key.size(1), heads // key.size(1), size)
    output = torch.nn.functional.scaled_dot_product_attention(
        shared, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return output.reshape(batch, 1, heads, size), None


def use_grouped_attention(model: Any) -> None:
    """Have a model that attends by `sdpa` do it this way; others are left alone."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, grouped_attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)
