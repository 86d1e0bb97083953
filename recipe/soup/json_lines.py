"""Reading the JSON lines that verl's loggers and dumps write. Imports no verl."""

import json
from pathlib import Path
from typing import Any


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All lines. Only a newline ends one: `str.splitlines` also splits at characters that JSON leaves as they are."""
    return [json.loads(line) for line in path.read_text().split("\n") if line]
