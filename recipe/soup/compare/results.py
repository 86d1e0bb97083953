"""What runs left behind, as tables. Imports no verl."""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from recipe.soup.pass_at_k import pass_at_k
from recipe.soup.summary import read_metrics, validation_accuracy

PASS_AT = (1, 4, 8, 16)


@dataclass(frozen=True)
class Result:
    """One run.

    Attributes:
        metrics: by step.
        before, after: correct samples of each validation problem at the first and the last validation.
        tries: samples of each problem.
    """

    name: str
    seed: int
    metrics: dict[int, dict[str, float]]
    before: np.ndarray
    after: np.ndarray
    tries: int

    def column(self, ending: str) -> pd.Series:
        """The metric whose key ends so, by step; steps that do not have it are left out."""
        return pd.Series(
            {
                step: value
                for step, values in sorted(self.metrics.items())
                for key, value in values.items()
                if key.endswith(ending)
            },
            dtype=float,
        )

    @property
    def accuracy(self) -> pd.Series:
        """Of unmixed validation, by step."""
        return pd.Series(validation_accuracy(self.metrics), dtype=float).sort_index()


def correct_samples(dump: Path) -> tuple[np.ndarray, int]:
    """Correct samples of each problem, and samples of each, in one of verl's dumps of validation samples."""
    scores: dict[str, list[float]] = defaultdict(list)
    for row in map(json.loads, dump.read_text().splitlines()):
        scores[row["input"]].append(row["score"])
    correct = [sum(score > 0 for score in scores[problem]) for problem in sorted(scores)]
    return np.array(correct), min(map(len, scores.values()))


def read_result(name: str, seed: int, metrics: Path, validation: Path) -> Result:
    """A run's metrics and its first and last validation.

    Raises:
        FileNotFoundError: the run wrote no metrics.
    """
    table = read_metrics(metrics)
    dumps = sorted(validation.glob("*.jsonl"), key=lambda path: int(path.stem))
    if not dumps:
        return Result(name, seed, table, np.empty(0), np.empty(0), 0)
    before, _ = correct_samples(dumps[0])
    after, tries = correct_samples(dumps[-1])
    return Result(name, seed, table, before, after, tries)


def pass_curve(correct: np.ndarray, tries: int) -> dict[int, float]:
    """Unbiased pass@k over problems, for k = 1, 2, 4, ... up to `tries`."""
    ks = [2**i for i in range(int(np.log2(max(tries, 1))) + 1)]
    return {k: float(np.mean([pass_at_k(tries, int(hits), k) for hits in correct])) for k in ks if len(correct)}


def generated_tokens(result: Result) -> pd.Series:
    """Tokens that each step sampled: what its own policy wrote, and prefixes for later steps."""
    return result.column("soup/train/continuation/tokens").add(result.column("soup/cost/seed_tokens"), fill_value=0)


def figures(result: Result) -> dict[str, float]:
    """The end of a run in numbers, by the columns of the report."""
    curve = pass_curve(result.after, result.tries)
    tokens, seconds = generated_tokens(result), result.column("timing_s/step")
    row = {f"pass@{k}": curve[k] for k in PASS_AT if k in curve}
    greedy, entropy = result.column("soup/val/greedy"), result.column("soup/val/entropy")
    if len(greedy):
        row["greedy"] = float(greedy.iloc[-1])
    row["entropy"] = float((entropy if len(entropy) else result.column("actor/entropy")).iloc[-1])
    row["groups with signal"] = float(result.column("soup/train/groups_with_signal").tail(20).mean())
    row["tokens generated"] = float(tokens.sum()) if len(tokens) else float("nan")
    row["seconds a step"] = float(seconds.median()) if len(seconds) else float("nan")
    return row
