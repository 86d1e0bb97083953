"""Log-probs and entropies in pieces of some tokens, where flash-attn's kernel is not there to compute them.

Without it verl computes log-probs token by token: tens of thousands of small calls for a micro-batch, each of which
keeps a float32 copy of its logits for the backward pass. And where it pads, it computes the entropies of a whole
micro-batch at once, which takes several times the memory of its logits. In pieces there are few calls, and what the
backward pass needs is computed there again. Neither values nor gradients change: the tests compare them bit by bit.

verl imports this module right after its `torch_functional`.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from verl.utils import torch_functional

ON_ACCELERATOR = 128
"""Tokens of a piece: enough to keep a GPU busy with a language model's vocabulary."""
ON_CPU = 2**20
"""Logits of a piece, so that they stay in the cache."""

Function = Callable[..., torch.Tensor]


def pieces_of(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cut logits (..., vocabulary) into pieces (tokens, vocabulary)."""
    rows = max(ON_CPU // logits.shape[-1], 1) if logits.device.type == "cpu" else ON_ACCELERATOR
    return logits.flatten(0, -2).split(rows)


def _log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What verl computes for each token, for (tokens, vocabulary) and (tokens,)."""
    at = labels.unsqueeze(-1)
    if logits.dtype in (torch.float32, torch.float64):
        return logits.gather(-1, at).squeeze(-1) - logits.logsumexp(dim=-1)
    return F.log_softmax(logits, dim=-1).gather(-1, at).squeeze(-1)


def log_probs_in_pieces(by_token: Function) -> Function:
    """verl's `logprobs_from_logits_v2`; for logits (..., vocabulary) and labels (...)."""

    @wraps(by_token)
    def log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        pieces = pieces_of(logits)
        of_pieces = labels.flatten().split([len(piece) for piece in pieces])
        again = torch.is_grad_enabled() and logits.requires_grad
        found = [
            checkpoint(_log_probs, piece, its, use_reentrant=False, preserve_rng_state=False)
            if again
            else _log_probs(piece, its)
            for piece, its in zip(pieces, of_pieces, strict=True)
        ]
        return torch.cat(found).view(labels.shape)

    return log_probs


def entropy_in_pieces(at_once: Function) -> Function:
    """verl's `entropy_from_logits`, for logits (..., vocabulary)."""

    @wraps(at_once)
    def entropy(logits: torch.Tensor) -> torch.Tensor:
        return torch.cat([at_once(piece) for piece in pieces_of(logits)]).view(logits.shape[:-1])

    return entropy


functional: Any = torch_functional
if not functional.FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE:
    functional.logprobs_from_logits_v2 = log_probs_in_pieces(functional.logprobs_from_logits_v2)
    functional.entropy_from_logits = entropy_in_pieces(functional.entropy_from_logits)
