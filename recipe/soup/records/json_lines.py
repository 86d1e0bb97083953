"""Read the JSON lines that verl's loggers and dumps write, and make values fit for such lines."""

import json
import re
from codecs import BOM_UTF8
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from recipe.soup.errors import first_line, refuse

NUMBER = int | float
NAMES: dict[Any, str] = {dict: "an object", list: "a list", str: "text", int: "a whole number", NUMBER: "a number"}


def read_json_lines(path: Path, needs: Mapping[str, Any] | None = None, kind: str = "") -> list[dict[str, Any]]:
    """Read all lines that are complete; the last may not be, if its writer is still at work or was killed.

    Only a newline ends a line: `str.splitlines` also splits at characters that JSON leaves as they are.

    Args:
        needs: what each line must have, by its key: one of the types in `NAMES`.
        kind: what a file is in which all lines have that, and how it is written.

    Raises:
        SystemExit: the file cannot be read, another line is broken (two wrote at once, or a disk was full), or a line
            has not what it needs.
    """
    try:
        # Some editors and shells put a byte order mark at the beginning.
        *lines, last = path.read_bytes().removeprefix(BOM_UTF8).split(b"\n")
    except OSError as error:
        raise refuse("file", path, f"cannot be read ({error.strerror}).") from None
    rows = []
    for number, line in enumerate([*lines, last], start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            if number > len(lines):
                break
            what = "no UTF-8" if isinstance(error, UnicodeDecodeError) else f"no JSON ({first_line(error)})"
            raise refuse("file", path, f"line {number} is {what}; give another file, or take out that line.") from None
        _check(path, number, row, needs or {}, kind)
        rows.append(row)
    return rows


def _check(path: Path, number: int, row: Any, needs: Mapping[str, Any], kind: str) -> None:
    if not isinstance(row, dict):
        raise refuse("file", path, f"line {number} is {str(row)[:40]!r}, and must be an object in braces.")
    for key, form in needs.items():
        if key not in row:
            raise refuse("file", path, f"line {number} has no `{key}`, so this is not {kind}.")
        if not isinstance(row[key], form):
            raise refuse("file", path, f"`{key}` in line {number} is {str(row[key])[:40]!r}, not {NAMES[form]}.")


def dumps(folder: Path) -> dict[int, Path]:
    """Return the files of one of verl's dumps, `<step>.jsonl`, by step; other files are left out."""
    return {int(path.stem): path for path in folder.glob("*.jsonl") if re.fullmatch("[0-9]+", path.stem)}


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
