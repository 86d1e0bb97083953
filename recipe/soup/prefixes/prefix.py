"""A historical prefix, and how it is cut."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

UNKNOWN = -2
"""The version of tokens of which no policy is known; for the mathematics `NOBODY`."""


@dataclass(frozen=True)
class Prefix:
    """The first tokens of a response, as past policies sampled them.

    Attributes:
        token_ids: int32, shape (length,).
        log_probs: float32, shape (length,): natural log-probs at the rollout's temperature, under the policy that
            sampled the token.
        version_spans: (version, number of tokens) of each span that one policy sampled, in order. A version is the
            number of updates that made the policy; -1 is a policy of another run, `UNKNOWN` none.
        complete: whether the last token ended the response, so that nothing is left to continue.
    """

    token_ids: np.ndarray
    log_probs: np.ndarray
    version_spans: tuple[tuple[int, int], ...]
    complete: bool = False

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def versions(self) -> list[int]:
        """The version that sampled each token."""
        return [version for version, tokens in self.version_spans for _ in range(tokens)]

    @property
    def oldest(self) -> int:
        """The smallest version; 0 for an empty prefix."""
        return min((version for version, _ in self.version_spans), default=0)

    @property
    def newest(self) -> int:
        """The largest version; 0 for an empty prefix."""
        return max((version for version, _ in self.version_spans), default=0)

    @property
    def surprise(self) -> float:
        """Mean of -log_probs in nats, an estimate of the entropy along the prefix; 0 for an empty one."""
        return -float(self.log_probs.mean()) if len(self) else 0.0

    def pack(self) -> dict[str, Any]:
        """Return a plain dictionary: TransferQueue does not return other objects as what they were."""
        return dict(vars(self))

    @classmethod
    def unpack(cls, packed: dict[str, Any]) -> "Prefix":
        """Undo `pack`."""
        return cls(
            # Copies: TransferQueue hands out views, which would keep its whole message in memory.
            np.array(packed["token_ids"], dtype=np.int32),
            np.array(packed["log_probs"], dtype=np.float32),
            tuple((int(version), int(tokens)) for version, tokens in packed["version_spans"]),
            bool(packed["complete"]),
        )

    def first(self, length: int) -> "Prefix":
        """Return the first tokens, fewer than there are, so that something is left to continue."""
        return Prefix(self.token_ids[:length], self.log_probs[:length], _spans(self.versions[:length]))

    @classmethod
    def from_sampled(
        cls,
        token_ids: list[int],
        log_probs: list[float],
        version_spans: Sequence[tuple[int, int]],
        length: int,
        on_eos: str,
    ) -> "Prefix":
        """Cut a prefix of `length` tokens out of what the engine returned for `tokens_to_ask_for(length)`.

        The extra token shows whether the response ended: an engine that stopped at or before `length` followed its own
        stop rule, whichever token that was; one that went on did not end within the prefix. (verl reports the same
        stop reason for both, and a model may have several end tokens.)

        Args:
            version_spans: (version, number of tokens) of each span that one policy sampled, in order.
            on_eos: `keep` the end token, which makes the prefix a complete sample, or `cut` it.
        """
        ids, values = np.asarray(token_ids), np.asarray(log_probs)
        versions = np.repeat([version for version, _ in version_spans], [tokens for _, tokens in version_spans])
        return cls.from_response(ids, values, versions, length, on_eos)

    @classmethod
    def from_response(
        cls, token_ids: np.ndarray, log_probs: np.ndarray, versions: np.ndarray, length: int, on_eos: str
    ) -> "Prefix":
        """Cut a prefix of at most `length` tokens out of a finished response.

        A response that is not longer than `length` is taken whole, and its last token is its end.

        Args:
            token_ids, log_probs, versions: shape (response_length,), of a response with one token or more.
            on_eos: `keep` the end token, which makes the prefix a complete sample, or `cut` it.
        """
        ended = len(token_ids) <= length
        kept = len(token_ids) - 1 if ended and on_eos == "cut" else min(len(token_ids), length)
        return cls(
            token_ids=np.array(token_ids[:kept], dtype=np.int32),
            log_probs=np.array(log_probs[:kept], dtype=np.float32),
            version_spans=_spans(versions[:kept].tolist()),
            complete=ended and on_eos == "keep",
        )


def _spans(versions: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(version, number of tokens) of each span that one policy sampled."""
    return tuple((int(version), sum(1 for _ in span)) for version, span in groupby(versions))


def to_arrays(prefixes: Sequence[Prefix]) -> dict[str, Any]:
    """Join prefixes to plain arrays, one after the other; how many tokens and spans each has is to be kept beside."""
    spans = [span for prefix in prefixes for span in prefix.version_spans]
    return {
        "runs": np.asarray(spans, dtype=np.int64).reshape(-1, 2),
        "token_ids": np.concatenate([prefix.token_ids for prefix in prefixes] or [np.empty(0, np.int32)]),
        "log_probs": np.concatenate([prefix.log_probs for prefix in prefixes] or [np.empty(0, np.float32)]),
    }


def from_arrays(arrays: Any, sizes: Iterable[tuple[int, int, bool]]) -> list[Prefix]:
    """Undo `to_arrays`.

    Args:
        sizes: of each prefix the number of tokens and of spans, and whether it is complete.

    Raises:
        ValueError: the arrays are of other sizes.
    """
    sizes = list(sizes)
    token_ids, log_probs = arrays["token_ids"], arrays["log_probs"]
    all_spans = [tuple(span) for span in arrays["runs"].tolist()]
    if not sum(tokens for tokens, _, _ in sizes) == len(token_ids) == len(log_probs):
        raise ValueError("its arrays have other sizes than its table says")
    prefixes, token, span = [], 0, 0
    for tokens, spans, complete in sizes:
        own = slice(token, token + tokens)
        # Copies: a view would keep the whole file in memory until the last prefix is used up.
        ids, values = token_ids[own].copy(), log_probs[own].copy()
        prefixes.append(Prefix(ids, values, tuple(all_spans[span : span + spans]), bool(complete)))
        token, span = token + tokens, span + spans
    return prefixes


def tokens_to_ask_for(length: int, response_length: int) -> int:
    """Return how many tokens to sample for a prefix of `length`: one more, which shows whether it ended by itself.

    See `Prefix.from_sampled`. A whole response has no further token.
    """
    return min(length + 1, response_length)
