"""Read problems from parquet files in verl's columns."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd


@dataclass(frozen=True)
class Problem:
    """One row of a dataset in verl's columns."""

    messages: list[dict[str, str]]
    data_source: str
    ground_truth: Any
    extra_info: Any


def read_problems(files: Any, limit: int = -1) -> list[Problem]:
    """Read the rows of parquet files, at most `limit` of them (-1: all)."""
    names = [files] if isinstance(files, str | Path) else list(files)
    rows = pd.concat([pd.read_parquet(Path(name).expanduser()) for name in names])
    return problems_of((rows if limit < 0 else rows.head(limit)).to_dict("records"))


def problems_of(rows: list[Any]) -> list[Problem]:
    """Make problems of rows in verl's columns."""
    return [
        Problem(list(row["prompt"]), row["data_source"], row["reward_model"]["ground_truth"], row.get("extra_info"))
        for row in rows
    ]
