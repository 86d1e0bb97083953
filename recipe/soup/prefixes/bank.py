"""Keep prefixes until their prompt is trained on."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from recipe.soup.prefixes.prefix import Prefix, from_arrays, to_arrays


class PrefixBank:
    """Hold prefixes by prompt (any number that identifies it) and slot (which of the prompt's samples gets it).

    Takes 8 bytes a token. Not thread-safe.
    """

    def __init__(self) -> None:
        self._prompts: dict[int, dict[int, Prefix]] = {}
        self._size = 0
        self._nbytes = 0

    def put(self, prompt: int, slot: int, prefix: Prefix) -> None:
        """Store a prefix, in place of the one that the slot may have."""
        slots = self._prompts.setdefault(prompt, {})
        self._count(slots.get(slot), -1)
        slots[slot] = prefix
        self._count(prefix, 1)

    def slots(self, prompt: int) -> frozenset[int]:
        """Return the slots of a prompt that have their prefix."""
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
        """Number of bytes in the arrays."""
        return self._nbytes

    def items(self) -> Iterable[tuple[int, int, Prefix]]:
        """Iterate over (prompt, slot, prefix)."""
        for prompt, slots in self._prompts.items():
            for slot, prefix in slots.items():
                yield prompt, slot, prefix

    def save(self, path: Path, source: str, next_ordinal: int, fingerprints: dict[int, int]) -> None:
        """Write the bank as one .npz of plain arrays.

        Args:
            source: `algorithm.soup.source` of the run.
            next_ordinal: place in the order of training of the first prompt that was not trained on yet.
            fingerprints: fingerprint of each prompt that comes next, by ordinal; a resumed run must meet the same.
        """
        items = list(self.items())
        table = [(prompt, slot, p.complete, len(p), len(p.version_spans)) for prompt, slot, p in items]
        np.savez(
            path,
            source=source,
            next_ordinal=next_ordinal,
            fingerprints=np.asarray(list(fingerprints.items()), dtype=np.int64).reshape(-1, 2),
            table=np.asarray(table, dtype=np.int64).reshape(-1, 5),
            **to_arrays([p for _, _, p in items]),
        )

    @classmethod
    def load(cls, path: Path) -> tuple["PrefixBank", int, dict[int, int]]:
        """Read what `save` wrote; returns the bank, `next_ordinal` and `fingerprints`."""
        bank = cls()
        with np.load(path, allow_pickle=False) as arrays:
            table = arrays["table"].tolist()
            prefixes = from_arrays(arrays, [(length, spans, complete) for _, _, complete, length, spans in table])
            next_ordinal = int(arrays["next_ordinal"])
            fingerprints = dict(arrays["fingerprints"].tolist())
        for (prompt, slot, *_), prefix in zip(table, prefixes, strict=True):
            bank.put(prompt, slot, prefix)
        return bank, next_ordinal, fingerprints
