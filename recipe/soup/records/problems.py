"""Problems and rewards as verl stores them: rows of parquet files, and functions that score a response's text."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any
from zlib import crc32

import pandas as pd

from recipe.soup.settings import refuse


@dataclass(frozen=True)
class Problem:
    """One row of a dataset in verl's columns."""

    messages: list[dict[str, str]]
    data_source: str
    ground_truth: Any
    extra_info: Any


Reward = Callable[[Problem, str], dict[str, Any]]
"""Of a problem and a response's text: `score`, and whatever else the reward function tells (`acc`, `pred`)."""


def read_problems(files: Any, limit: int = -1) -> list[Problem]:
    """The rows of parquet files, at most `limit` of them (-1: all)."""
    names = [files] if isinstance(files, str | Path) else list(files)
    rows = pd.concat([pd.read_parquet(Path(name).expanduser()) for name in names])
    return problems_of((rows if limit < 0 else rows.head(limit)).to_dict("records"))


def problems_of(rows: list[Any]) -> list[Problem]:
    """From verl's columns."""
    return [
        Problem(list(row["prompt"]), row["data_source"], row["reward_model"]["ground_truth"], row.get("extra_info"))
        for row in rows
    ]


def load_reward(path: str, name: str = "compute_score") -> Reward:
    """A reward function of verl's form, from a module (`pkg://package.module`) or a file.

    Raises:
        SystemExit: there is none; one sentence.
    """
    from verl.utils.import_utils import load_extern_object  # takes seconds, which commands without rewards spare

    try:
        compute: Any = load_extern_object(path, name)
    except (ImportError, FileNotFoundError, AttributeError) as error:
        raise refuse("reward", f"{path}:{name}", f"cannot be loaded ({error}).") from error

    @wraps(compute)
    def reward(problem: Problem, text: str) -> dict[str, Any]:
        score = compute(problem.data_source, text, problem.ground_truth, problem.extra_info)
        return score if isinstance(score, dict) else {"score": score}

    return reward


def source_of(reward: Reward) -> str:
    """A checksum of the file in which the reward function stands: an edited one grades anew."""
    file = inspect.getsourcefile(inspect.unwrap(reward))
    return f"{crc32(Path(file).read_bytes()):08x}" if file else ""
