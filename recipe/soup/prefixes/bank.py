"""Keep prefixes until their prompt is trained on."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from recipe.soup.prefixes.files import UnreadableError, read_arrays, write_arrays
from recipe.soup.prefixes.prefix import Prefix, from_arrays, to_arrays

FORMAT = 2
"""Of the file. The first one had no number, and did not say what shaped its prefixes."""


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

    def of(self, prompt: int) -> Mapping[int, Prefix]:
        """Return the prefixes of a prompt, by slot, which stay where they are."""
        return self._prompts.get(prompt, {})

    def drop(self, prompt: int, slot: int) -> None:
        """Remove the prefix of a slot."""
        self._count(self._prompts[prompt].pop(slot), -1)

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

    def save(self, path: Path, origin: Mapping[str, Any], next_ordinal: int, fingerprints: Mapping[int, int]) -> None:
        """Write the bank as one .npz of plain arrays.

        Args:
            origin: what shaped the prefixes; plain values by the names of their keys.
            next_ordinal: place in the order of training of the first prompt that was not trained on yet.
            fingerprints: fingerprint of each prompt that comes next, by ordinal; a resumed run must meet the same.
        """
        items = list(self.items())
        table = [(prompt, slot, p.complete, len(p), len(p.version_spans)) for prompt, slot, p in items]
        write_arrays(
            path,
            format=FORMAT,
            origin=json.dumps(dict(origin)),
            next_ordinal=next_ordinal,
            fingerprints=np.asarray(list(fingerprints.items()), dtype=np.int64).reshape(-1, 2),
            table=np.asarray(table, dtype=np.int64).reshape(-1, 5),
            **to_arrays([p for _, _, p in items]),
        )

    @classmethod
    def load(cls, path: Path) -> tuple["PrefixBank", int, dict[int, int]]:
        """Read what `save` wrote; returns the bank, `next_ordinal` and `fingerprints`.

        Raises:
            UnreadableError: the file is torn, or of another kind.
        """
        bank = cls()
        with read_arrays(path) as arrays:
            table = arrays["table"].tolist()
            prefixes = from_arrays(arrays, [(length, spans, complete) for _, _, complete, length, spans in table])
            next_ordinal = int(arrays["next_ordinal"])
            fingerprints = dict(arrays["fingerprints"].tolist())
        for (prompt, slot, *_), prefix in zip(table, prefixes, strict=True):
            bank.put(prompt, slot, prefix)
        return bank, next_ordinal, fingerprints


def read_origin(path: Path) -> dict[str, Any]:
    """Read what shaped the prefixes of a bank, without the prefixes.

    Raises:
        UnreadableError: the file is torn, of another kind, or of another version of this package.
    """
    with read_arrays(path) as arrays:
        if "origin" not in arrays:
            raise UnreadableError(f"{path.name} was written before it said what shaped its prefixes")
        if (written := int(arrays["format"])) > FORMAT:
            raise UnreadableError(f"{path.name} has the format {written}, and this version reads up to {FORMAT}")
        return dict(json.loads(str(arrays["origin"])))
