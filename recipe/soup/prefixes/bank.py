"""Historical prefixes, and the bank that keeps them until their prompt is trained on. Imports no verl."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Prefix:
    """The first tokens of a response, as past policies sampled them.

    Attributes:
        token_ids: int32, shape (length,).
        log_probs: float32, shape (length,); natural log, at the rollout's temperature, under the policy that sampled.
        runs: (version, tokens) of each run of tokens that one policy sampled, in order. A version is the number of
            updates that made the policy; -1 is a policy of another run.
        complete: the last token ended the response, so nothing is left to continue.
    """

    token_ids: np.ndarray
    log_probs: np.ndarray
    runs: tuple[tuple[int, int], ...]
    complete: bool = False

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def versions(self) -> list[int]:
        """The version that sampled each token."""
        return [version for version, tokens in self.runs for _ in range(tokens)]

    @property
    def oldest(self) -> int:
        """The smallest version; of an empty prefix, 0."""
        return min((version for version, _ in self.runs), default=0)

    @property
    def newest(self) -> int:
        """The largest version; of an empty prefix, 0."""
        return max((version for version, _ in self.runs), default=0)

    @property
    def surprise(self) -> float:
        """Mean -log-prob of its tokens, in nats: an estimate of the entropy along it. Of an empty prefix, 0."""
        return -float(self.log_probs.mean()) if len(self) else 0.0

    @classmethod
    def from_sampled(
        cls, token_ids: list[int], log_probs: list[float], runs: Sequence[tuple[int, int]], length: int, on_eos: str
    ) -> "Prefix":
        """Cut a prefix of `length` tokens out of what the engine returned for `tokens_to_ask_for(length)`.

        The extra token is what tells an end apart: an engine that stopped at or before `length` did so by its own
        stop rule, whichever token that was; one that went on did not end within the prefix. (verl reports the same
        stop reason for both, and a model may have several end tokens.)

        Args:
            runs: (version, tokens) of each run of tokens that one policy sampled, in order.
            on_eos: `keep` the end token, which makes the prefix a complete sample, or `cut` it.
        """
        ids, values = np.asarray(token_ids), np.asarray(log_probs)
        versions = np.repeat([version for version, _ in runs], [tokens for _, tokens in runs])
        return cls.from_response(ids, values, versions, length, on_eos)

    @classmethod
    def from_response(
        cls, token_ids: np.ndarray, log_probs: np.ndarray, versions: np.ndarray, length: int, on_eos: str
    ) -> "Prefix":
        """Cut a prefix of at most `length` tokens out of a finished response.

        A response that is not longer than `length` is taken whole: its last token is its end.

        Args:
            token_ids, log_probs, versions: shape (response_length,), of a response with one token or more.
            on_eos: `keep` the end token, which makes the prefix a complete sample, or `cut` it.
        """
        ended = len(token_ids) <= length
        kept = len(token_ids) - 1 if ended and on_eos == "cut" else min(len(token_ids), length)
        return cls(
            token_ids=np.array(token_ids[:kept], dtype=np.int32),
            log_probs=np.array(log_probs[:kept], dtype=np.float32),
            runs=tuple((int(version), sum(1 for _ in run)) for version, run in groupby(versions[:kept].tolist())),
            complete=ended and on_eos == "keep",
        )


def tokens_to_ask_for(length: int, response_length: int) -> int:
    """For a prefix of `length` tokens: one more, which tells whether it ended by itself (`Prefix.from_sampled`).

    A whole response has no further token.
    """
    return min(length + 1, response_length)


class PrefixBank:
    """Prefixes by prompt (any number that identifies it) and slot (which of the prompt's samples gets it).

    Holds 8 bytes a token. Not thread-safe.
    """

    def __init__(self) -> None:
        self._prompts: dict[int, dict[int, Prefix]] = {}
        self._size = 0
        self._nbytes = 0

    def put(self, prompt: int, slot: int, prefix: Prefix) -> None:
        """Store a prefix; putting the same slot again replaces it."""
        slots = self._prompts.setdefault(prompt, {})
        self._count(slots.get(slot), -1)
        slots[slot] = prefix
        self._count(prefix, 1)

    def slots(self, prompt: int) -> frozenset[int]:
        """The slots of a prompt that have their prefix."""
        return frozenset(self._prompts.get(prompt, ()))

    def take(self, prompt: int) -> dict[int, Prefix]:
        """Remove and return the prefixes of a prompt, by slot; empty if there are none."""
        slots = self._prompts.pop(prompt, {})
        for prefix in slots.values():
            self._count(prefix, -1)
        return slots

    def _count(self, prefix: Prefix | None, sign: int) -> None:
        if prefix is not None:
            self._size += sign
            self._nbytes += sign * (prefix.token_ids.nbytes + prefix.log_probs.nbytes)

    def __len__(self) -> int:
        return self._size

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays held."""
        return self._nbytes

    def items(self) -> Iterable[tuple[int, int, Prefix]]:
        """Prompt, slot and prefix of everything held."""
        for prompt, slots in self._prompts.items():
            for slot, prefix in slots.items():
                yield prompt, slot, prefix

    def save(self, path: Path, source: str, next_ordinal: int, fingerprints: dict[int, int]) -> None:
        """Write the bank as one .npz of plain arrays.

        Args:
            source: where the prefixes came from.
            next_ordinal: the first prompt, in data order, that was not trained on yet.
            fingerprints: of the prompts that come next, by ordinal; a resumed run must meet the same ones.
        """
        items = list(self.items())
        table = [(prompt, slot, p.complete, len(p), len(p.runs)) for prompt, slot, p in items]
        np.savez(
            path,
            source=source,
            next_ordinal=next_ordinal,
            fingerprints=np.asarray(list(fingerprints.items()), dtype=np.int64).reshape(-1, 2),
            table=np.asarray(table, dtype=np.int64).reshape(-1, 5),
            runs=np.asarray([run for _, _, p in items for run in p.runs], dtype=np.int64).reshape(-1, 2),
            token_ids=np.concatenate([p.token_ids for _, _, p in items] or [np.empty(0, np.int32)]),
            log_probs=np.concatenate([p.log_probs for _, _, p in items] or [np.empty(0, np.float32)]),
        )

    @classmethod
    def load(cls, path: Path) -> tuple["PrefixBank", int, dict[int, int]]:
        """Read what `save` wrote: the bank, `next_ordinal` and `fingerprints`."""
        bank = cls()
        with np.load(path, allow_pickle=False) as arrays:
            table, token_ids, log_probs = arrays["table"], arrays["token_ids"], arrays["log_probs"]
            all_runs = [tuple(run) for run in arrays["runs"].tolist()]
            next_ordinal = int(arrays["next_ordinal"])
            fingerprints = dict(arrays["fingerprints"].tolist())
        token, run = 0, 0
        for prompt, slot, complete, length, runs in table.tolist():
            tokens, run_slice = slice(token, token + length), slice(run, run + runs)
            # Copies, so that a prefix that is used up does not keep the whole file in memory.
            ids, values = token_ids[tokens].copy(), log_probs[tokens].copy()
            bank.put(prompt, slot, Prefix(ids, values, tuple(all_runs[run_slice]), bool(complete)))
            token, run = token + length, run + runs
        return bank, next_ordinal, fingerprints
