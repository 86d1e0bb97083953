"""Prompts and rewards of the lab: the very files and functions that the config names for verl."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig
from verl.utils.import_utils import load_extern_object


@dataclass(frozen=True)
class Problem:
    """One row of a dataset in verl's columns."""

    messages: list[dict[str, str]]
    data_source: str
    ground_truth: Any
    extra_info: Any


def read_problems(files: Any, limit: int = -1) -> list[Problem]:
    """The rows of parquet files, at most `limit` of them (-1: all)."""
    names = [files] if isinstance(files, str) else list(files)
    rows = pd.concat([pd.read_parquet(Path(name).expanduser()) for name in names])
    rows = rows if limit < 0 else rows.head(limit)
    return [
        Problem(list(row["prompt"]), row["data_source"], row["reward_model"]["ground_truth"], row.get("extra_info"))
        for row in rows.to_dict("records")
    ]


def endless(problems: list[Problem], seed: int) -> Iterator[Problem]:
    """Epoch after epoch, each in another order."""
    rng = random.Random(seed)
    while True:
        yield from rng.sample(problems, len(problems))


def reward_function(config: DictConfig) -> Callable[[Problem, str], float]:
    """`reward.custom_reward_function` of the config, on a problem and a response's text."""
    named = config.reward.custom_reward_function
    compute: Any = load_extern_object(named.path, named.name)

    def reward(problem: Problem, text: str) -> float:
        score = compute(problem.data_source, text, problem.ground_truth, problem.extra_info)
        return float(score["score"] if isinstance(score, dict) else score)

    return reward
