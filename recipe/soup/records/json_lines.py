"""Read the JSON lines that verl's loggers and dumps write, and make values fit for such lines."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read all lines that are complete; the last may not be, if its writer is still at work or was killed.

    Only a newline ends a line: `str.splitlines` also splits at characters that JSON leaves as they are.
    """
    *lines, last = path.read_text().split("\n")
    rows = [json.loads(line) for line in lines if line]
    try:
        return [*rows, json.loads(last)] if last else rows
    except json.JSONDecodeError:
        return rows


def writable(value: Any) -> Any:
    """A value that JSON has, or that has `tolist`; anything else as Python shows it.

    What a reward tells beside its score may be of any type.
    """
    if isinstance(value, np.ndarray) and value.dtype == object:
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): writable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [writable(item) for item in value]
    known = value is None or isinstance(value, str | int | float) or hasattr(value, "tolist")
    return value if known else repr(value)
