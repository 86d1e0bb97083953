"""Read the JSON lines that verl's loggers and dumps write."""

import json
from pathlib import Path
from typing import Any


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
