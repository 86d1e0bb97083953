"""What a dataset's file holds, without reading its rows: columns, their kinds, how many rows."""

import json
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

from recipe.soup.errors import first_line, refuse

FORMATS = (".parquet", ".json", ".jsonl")
"""What verl's dataset reads, by the end of the name."""
SAMPLED_LINES = 1000
COUNTED_BYTES = 2**25
"""Rows of larger files are not counted: that would take longer than a check may."""
MESSAGES, TEXT, MAPPING, MAP, OTHER = "messages", "text", "mapping", "map", "other"
"""Kinds of columns. The keys of a map, unlike those of a mapping, are in the rows."""


@dataclass
class Table:
    """A file of rows.

    Attributes:
        columns: kind by name; a field of a mapping has a dot in its name.
        rows: how many; None if that would take too long.
        empty: columns that are null in some row.
    """

    columns: dict[str, str]
    rows: int | None
    empty: set[str] = field(default_factory=set)


def read_table(key: str, path: Path) -> Table:
    """Look at a file in one of the formats that verl reads.

    Raises:
        SystemExit: it is not there, or cannot be read.
    """
    if not path.exists():
        raise refuse(key, path, "no such file; give a parquet file with verl's columns.")
    try:
        if path.suffix not in FORMATS or path.is_dir():
            raise ValueError(f"verl reads {', '.join(FORMATS)}")
        return _parquet(path) if path.suffix == ".parquet" else _json(path)
    except (OSError, ValueError) as error:
        why = f"cannot be read as {path.suffix.removeprefix('.') or 'a dataset'} ({first_line(error)})"
        raise refuse(key, path, f"{why}; give a parquet file with verl's columns.") from None


def values_of(path: Path, column: str) -> set[str]:
    """Return the distinct values of a column, as text; of a json file those of its first rows.

    Args:
        path: a file that `read_table` has read.
    """
    if path.suffix == ".parquet":
        return {str(value) for value in parquet.read_table(path, columns=[column])[column].unique().to_pylist()}
    rows, _ = _json_rows(path)
    return {str(row.get(column)) for row in rows}


def _parquet(path: Path) -> Table:
    file = parquet.ParquetFile(path)
    columns: dict[str, str] = {}
    for column in file.schema_arrow:
        columns[column.name] = _kind_of_type(column.type)
        if pa.types.is_struct(column.type):
            columns |= {f"{column.name}.{part.name}": _kind_of_type(part.type) for part in column.type}
    empty = set()
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    for group in groups:
        for leaf in (group.column(i) for i in range(group.num_columns)):
            statistics = leaf.statistics
            if statistics is not None and statistics.has_null_count and statistics.null_count:
                empty.add(leaf.path_in_schema)  # also where the list or the mapping around it is null
    return Table(columns, file.metadata.num_rows, empty)


def _kind_of_type(kind: pa.DataType) -> str:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return MESSAGES if pa.types.is_struct(kind.value_type) or pa.types.is_map(kind.value_type) else OTHER
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return TEXT
    if pa.types.is_map(kind):
        return MAP
    return MAPPING if pa.types.is_struct(kind) else OTHER


def _json_rows(path: Path) -> tuple[list[Any], int | None]:
    """Read lines, or one list of rows; returns the first ones, and how many there are."""
    with path.open("rb") as file:
        start = file.read(1024).lstrip()[:1]
        file.seek(0)
        small = path.stat().st_size <= COUNTED_BYTES
        if start == b"[" and small:
            found = json.load(file)
            rows, count = found[:SAMPLED_LINES], len(found)
        elif start == b"[":
            head = file.read(COUNTED_BYTES).decode(errors="ignore").lstrip()[1:].lstrip()
            rows, count = [json.JSONDecoder().raw_decode(head)[0]], None
        else:
            rows = [json.loads(line) for line in islice(file, SAMPLED_LINES) if line.strip()]
            count = len(rows) + sum(bool(line.strip()) for line in file) if small else None
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("its rows are no mappings of columns")
    return rows, count


def _json(path: Path) -> Table:
    rows, count = _json_rows(path)
    columns: dict[str, str] = {}
    empty: set[str] = set()
    for row in rows:
        for name, value in row.items():
            _note(columns, empty, name, value)
            if isinstance(value, dict):
                for part, inner in value.items():
                    _note(columns, empty, f"{name}.{part}", inner)
    return Table(columns, count, empty)


def _note(columns: dict[str, str], empty: set[str], name: str, value: Any) -> None:
    if value is None:
        empty.add(name)
    else:
        columns[name] = _kind_of_value(value)


def _kind_of_value(value: Any) -> str:
    if isinstance(value, list):
        return MESSAGES if all(isinstance(item, dict) for item in value) else OTHER
    if isinstance(value, dict):
        return MAPPING
    return TEXT if isinstance(value, str) else OTHER
