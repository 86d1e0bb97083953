"""Finished samples, as the trainer hands them to a source of prefixes, and by what their prompts are told apart."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from recipe.soup.prefixes.requests import PromptWithTools


@dataclass(frozen=True)
class FinishedSample:
    """A sample, as the trainer hands it to a source that keeps responses; it may never be trained on (`wants_evicted`).

    Of a sample with several turns only the first is here, since no prefix goes beyond it.

    Attributes:
        prompt: its prompt's `fingerprint`.
        ordinal: the prompt's place in the order of training.
        token_ids, log_probs, versions: shape (response_length,): the response, and for each of its tokens the behaviour
            log-prob and the version that sampled it.
        reward: reward of the whole response.
        entropy: shape (response_length,), nats, under the policy that is about to be updated; None if not computed.
        prompt_ids: shape (prompt_length,), the prompt as the policy reads it; only for `selection=verified`.
        distributions: shape (response_length, vocabulary), the behaviour log-probs of all tokens at each place; only
            for `verification.rejected=residual`.
    """

    prompt: int
    ordinal: int
    token_ids: np.ndarray
    log_probs: np.ndarray
    versions: np.ndarray
    reward: float
    entropy: np.ndarray | None = None
    prompt_ids: np.ndarray | None = None
    distributions: np.ndarray | None = None


def fingerprint(messages: Any) -> int:
    """Return 63 bits that tell prompts apart, in this run and in a later one."""
    content: Any = messages
    if isinstance(messages, PromptWithTools):
        content = [*messages.messages, messages.tools]
    digest = hashlib.blake2b(repr(list(content)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
