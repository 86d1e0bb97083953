"""From a row of the data to the token ids of its demonstrations."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from recipe.soup.prefixes.prefix import UNKNOWN, Prefix
from recipe.soup.settings import DemonstrationSettings

Rows = Callable[[Any], Iterable[Mapping[str, Any]]]
"""From what was fetched together to the columns of each prompt."""


def texts_in(value: Any, in_steps: bool = False) -> list[str]:
    """The demonstrations in a cell; empty ones and those of another role than the assistant are left out.

    Args:
        value: a text, a message, a list of either (or of lists), or nothing.
        in_steps: whether a list of texts is one demonstration in pieces.

    Raises:
        TypeError: it is something else.
    """
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return []
    if isinstance(value, str):
        return [value] if value else []
    if isinstance(value, Mapping):
        return texts_in(value.get("content")) if value.get("role", "assistant") == "assistant" else []
    if isinstance(value, np.ndarray | Sequence):
        found = [text for item in value for text in texts_in(item, in_steps)]
        return ["".join(found)] if in_steps and found else found
    raise TypeError(f"a demonstration is a text, a message or a list of them, and not {value!r:.60}")


def cell(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column, or of a field of a mapping (`reward_model.candidates`); None if there is none."""
    value: Any = row
    for part in column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


class Demonstrations:
    """Reads demonstrations off what the trainer fetched.

    Args:
        settings: `algorithm.soup.demonstrations`.
        tokenizer: of the policy; its end token ends a demonstration.
        rows: see `Rows`.
    """

    def __init__(self, settings: DemonstrationSettings, tokenizer: Any, rows: Rows) -> None:
        self._settings, self._tokenizer, self._rows = settings, tokenizer, rows

    def __call__(self, batch: Any) -> list[list[np.ndarray]]:
        """For each prompt the token ids of its demonstrations, the end token included.

        Raises:
            TypeError: a cell holds something else.
        """
        return [
            [self._ids(text) for text in texts_in(cell(row, self._settings.column), self._settings.list == "steps")]
            for row in self._rows(batch)
        ]

    def _ids(self, text: str) -> np.ndarray:
        ids, end = self._tokenizer.encode(text, add_special_tokens=False), self._tokenizer.eos_token_id
        return np.array(ids if ids[-1:] == [end] else [*ids, end], dtype=np.int32)


def as_prefix(token_ids: np.ndarray, length: int, on_eos: str) -> Prefix:
    """The first tokens of a demonstration. No policy is known for them: version -2, and log-probs that nobody reads."""
    unknown = np.zeros(len(token_ids), dtype=np.float32)
    return Prefix.from_response(token_ids, unknown, np.full(len(token_ids), UNKNOWN), length, on_eos)
