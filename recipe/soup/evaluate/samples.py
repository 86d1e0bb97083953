"""The samples of an evaluation on disk: one JSON line each, whole problems only, so that a killed run can go on."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from recipe.soup.settings import refuse

Row = dict[str, Any]
"""A sample: problem, input, output, score, tokens, finish_reason, and what else its reward function told."""


def open_samples(path: Path, settings: dict[str, Any], samples: int) -> dict[int, list[Row]]:
    """Samples by problem that an earlier run with the same settings left; what it left half done is dropped.

    Args:
        path: the JSON lines; the settings stand beside them, in a file of the same name with `.settings.json`.
        samples: that every problem gets.

    Raises:
        SystemExit: the earlier run had other settings.
    """
    beside = path.with_suffix(".settings.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    if beside.exists():
        earlier = json.loads(beside.read_text())
        for key, value in settings.items():
            if earlier.get(key) != value:
                raise refuse(key, value, f"{path} was begun with {earlier.get(key)}; give another --out, or delete it.")
    beside.write_text(json.dumps(settings, indent=1))
    found: dict[int, list[Row]] = defaultdict(list)
    for line in path.read_text().split("\n") if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the kill came while it was written
        found[row["problem"]].append(row)
    whole = {problem: rows for problem, rows in found.items() if len(rows) == samples}
    path.write_text("".join(map(_lines, whole.values())))
    return whole


def add_problem(path: Path, rows: list[Row]) -> None:
    """Append all samples of one problem."""
    with path.open("a") as file:
        file.write(_lines(rows))


def _lines(rows: list[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
