"""Historical prefixes, and the bank that keeps them until their prompt is trained on. Imports no verl."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recipe.soup.settings import PrefixLengthSettings


@dataclass(frozen=True)
class Prefix:
    """The first tokens of a response, as a past policy sampled them.

    Attributes:
        token_ids: int32, shape (length,).
        log_probs: float32, shape (length,); natural log, at the rollout's temperature, under the policy that sampled.
        version: number of updates that made that policy.
        complete: the last token ended the response, so nothing is left to continue.
    """

    token_ids: np.ndarray
    log_probs: np.ndarray
    version: int
    complete: bool = False

    def __len__(self) -> int:
        return len(self.token_ids)

    @classmethod
    def from_sampled(
        cls, token_ids: list[int], log_probs: list[float], version: int, length: int, on_eos: str
    ) -> "Prefix":
        """Cut a prefix of `length` tokens out of what the engine returned when asked for `length + 1`.

        The extra token is what tells an end apart: an engine that stopped at or before `length` did so by its own
        stop rule, whichever token that was; one that went on did not end within the prefix. (verl reports the same
        stop reason for both, and a model may have several end tokens.)

        Args:
            on_eos: `keep` the end token, which makes the prefix a complete sample, or `cut` it.
        """
        ended = len(token_ids) <= length
        kept = len(token_ids) - 1 if ended and on_eos == "cut" else min(len(token_ids), length)
        return cls(
            token_ids=np.asarray(token_ids[:kept], dtype=np.int32),
            log_probs=np.asarray(log_probs[:kept], dtype=np.float32),
            version=version,
            complete=ended and on_eos == "keep",
        )


def plan_lengths(
    settings: PrefixLengthSettings, mixed_share: float, samples: int, seed: int, ordinal: int
) -> list[int]:
    """Prefix lengths in tokens, one for each mixed sample of a prompt; samples 0, 1, … are the mixed ones.

    The number of mixed samples is `samples * mixed_share`, a fraction of it being drawn. The draw depends only on
    the seed and on the prompt's place in the data order, so a resumed run draws the same.

    Args:
        samples: `rollout.n`.
        ordinal: the prompt's place in the order of training, from 0.
    """
    rng = np.random.default_rng([seed, ordinal])
    count = int(samples * mixed_share + rng.random())
    assert settings.max is not None
    low = settings.max if settings.distribution == "fixed" else settings.min
    return rng.integers(low, settings.max, size=count, endpoint=True).tolist()


class PrefixBank:
    """Prefixes by prompt (its place in the data order) and slot (which of the prompt's samples gets it).

    Holds 8 bytes a token. Not thread-safe.
    """

    def __init__(self) -> None:
        self._prompts: dict[int, dict[int, Prefix]] = {}

    def put(self, ordinal: int, slot: int, prefix: Prefix) -> None:
        """Store a prefix; putting the same slot again replaces it."""
        self._prompts.setdefault(ordinal, {})[slot] = prefix

    def slots(self, ordinal: int) -> frozenset[int]:
        """The slots of a prompt that have their prefix."""
        return frozenset(self._prompts.get(ordinal, ()))

    def take(self, ordinal: int) -> dict[int, Prefix]:
        """Remove and return the prefixes of a prompt, by slot; empty if there are none."""
        return self._prompts.pop(ordinal, {})

    def __len__(self) -> int:
        return sum(map(len, self._prompts.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays held."""
        return sum(prefix.token_ids.nbytes + prefix.log_probs.nbytes for _, _, prefix in self._items())

    def _items(self) -> Iterable[tuple[int, int, Prefix]]:
        for ordinal, slots in self._prompts.items():
            for slot, prefix in slots.items():
                yield ordinal, slot, prefix

    def save(self, path: Path, next_ordinal: int, fingerprints: dict[int, int]) -> None:
        """Write the bank as one .npz of plain arrays.

        Args:
            next_ordinal: the first prompt, in data order, that was not trained on yet.
            fingerprints: of the prompts that come next, by ordinal; a resumed run must meet the same ones.
        """
        items = list(self._items())
        table = [(o, s, p.version, p.complete, len(p)) for o, s, p in items]
        np.savez(
            path,
            next_ordinal=next_ordinal,
            fingerprints=np.asarray(list(fingerprints.items()), dtype=np.int64).reshape(-1, 2),
            table=np.asarray(table, dtype=np.int64).reshape(-1, 5),
            token_ids=np.concatenate([p.token_ids for _, _, p in items] or [np.empty(0, np.int32)]),
            log_probs=np.concatenate([p.log_probs for _, _, p in items] or [np.empty(0, np.float32)]),
        )

    @classmethod
    def load(cls, path: Path) -> tuple["PrefixBank", int, dict[int, int]]:
        """Read what `save` wrote: the bank, `next_ordinal` and `fingerprints`."""
        bank = cls()
        with np.load(path, allow_pickle=False) as arrays:
            table, token_ids, log_probs = arrays["table"], arrays["token_ids"], arrays["log_probs"]
            next_ordinal = int(arrays["next_ordinal"])
            fingerprints = dict(arrays["fingerprints"].tolist())
        ends = np.cumsum(table[:, 4])
        for (ordinal, slot, version, complete, length), end in zip(table.tolist(), ends.tolist(), strict=True):
            part = slice(end - length, end)
            bank.put(ordinal, slot, Prefix(token_ids[part], log_probs[part], version, bool(complete)))
        return bank, next_ordinal, fingerprints
