"""Read what runs left behind, as tables."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from recipe.soup.records.json_lines import NUMBER, dumps, read_json_lines
from recipe.soup.records.metrics_file import read_metrics, validation_accuracy
from recipe.soup.records.pass_at_k import PASS_AT, pass_at_k, powers_of_two

LAST = 20
"""Number of last steps over which figures of training are averaged."""


Counts = dict[str, tuple[int, int]]
"""Number of correct samples and of all samples of each validation problem, by its prompt."""


@dataclass(frozen=True)
class Result:
    """What one run measured.

    Attributes:
        metrics: metrics by step.
        validations: counts of each validation, by step.
    """

    name: str
    seed: int
    metrics: dict[int, dict[str, float]]
    validations: dict[int, Counts]

    @property
    def before(self) -> Counts:
        """Counts of the validation before training; empty if there was none."""
        return self.validations.get(0, {})

    @property
    def after(self) -> Counts:
        """Counts of the last validation; empty if there was none."""
        return self.validations[max(self.validations)] if self.validations else {}

    @property
    def ends(self) -> tuple[int, int]:
        """The last step, and the last one after which it was validated; 0 for none."""
        return max(self.metrics, default=0), max(self.validations, default=0)

    def until(self, step: int) -> "Result":
        """Return the run as it was after this step."""
        metrics = {at: values for at, values in self.metrics.items() if at <= step}
        return replace(self, metrics=metrics, validations={s: v for s, v in self.validations.items() if s <= step})

    def column(self, ending: str) -> pd.Series:
        """Return the metric whose key has this ending, by step; steps without it are left out."""
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
        """Accuracy of unmixed validation, by step."""
        return pd.Series(validation_accuracy(self.metrics), dtype=float).sort_index()


def correct_samples(dump: Path) -> Counts:
    """Count the samples in one of verl's dumps of a validation; `acc` or a score above 0 makes a sample correct."""
    scores: dict[str, list[bool]] = defaultdict(list)
    for row in read_json_lines(dump, {"input": str, "score": NUMBER}, "verl's dump of a validation"):
        acc = row.get("acc")  # null if only the rewards of other data sources give it
        scores[row["input"]].append((row["score"] if acc is None else acc) > 0)
    return {problem: (sum(values), len(values)) for problem, values in sorted(scores.items())}


def read_result(name: str, seed: int, metrics: Path, validation: Path) -> Result:
    """Read a run's metrics and its validations.

    Raises:
        SystemExit: what the run wrote cannot be read.
    """
    by_step = read_metrics(metrics)
    # A run that starts anew leaves the dumps of the one before; only those of its own validations count.
    validated = {step for step, values in by_step.items() if any(key.startswith("val-") for key in values)}
    found = {step: path for step, path in dumps(validation).items() if step in validated}
    return Result(name, seed, by_step, {step: correct_samples(path) for step, path in found.items()})


def tries(counts: Counts) -> int:
    """Return the number of samples that every problem has at least."""
    return min((samples for _, samples in counts.values()), default=0)


def per_problem(counts: Counts, k: int, problems: Iterable[str] | None = None) -> np.ndarray:
    """Return unbiased pass@k of each problem, in the order of `problems`."""
    chosen = counts.values() if problems is None else [counts[problem] for problem in problems]
    return np.array([pass_at_k(samples, correct, k) for correct, samples in chosen])


def pass_curve(counts: Counts) -> dict[int, float]:
    """Return unbiased pass@k over problems for k = 1, 2, 4, ... up to their number of samples."""
    return {k: float(per_problem(counts, k).mean()) for k in powers_of_two(tries(counts))}


def generated_tokens(result: Result) -> pd.Series:
    """Return how many tokens each step sampled: continuations, prefixes for later steps, and groups that were evicted.

    What the current policy has accepted of old responses counts as its own, and was not sampled again.

    For a run without our metrics, verl's own give the tokens of all responses.
    """
    written = result.column("soup/train/continuation/tokens")
    if written.empty:
        prompt, response = result.column("prompt_length/mean"), result.column("response_length/mean")
        return (result.column("perf/total_num_tokens") * response / (prompt + response)).dropna()
    for others in ("soup/cost/seed_tokens", "soup/cost/evicted_tokens"):
        written = written.add(result.column(others), fill_value=0)
    return written.sub(result.column("soup/verified/accepted"), fill_value=0)


def figures(result: Result) -> dict[str, float]:
    """Return the figures of a run's end, by column of the report; what it did not measure is left out."""
    curve, row = pass_curve(result.after), {}
    for k in (k for k in PASS_AT if k in curve):
        row[f"pass@{k}"] = curve[k]
    columns = {
        "greedy": result.column("soup/val/greedy").tail(1),
        "entropy": result.column("soup/val/entropy").tail(1),
        "training entropy": result.column("actor/entropy").tail(LAST),
        "training groups with signal": result.column("soup/train/groups_with_signal").tail(LAST),
    }
    row |= {name: float(values.mean()) for name, values in columns.items() if len(values)}
    tokens, seconds = generated_tokens(result), result.column("timing_s/step")
    if len(tokens):
        row["tokens generated"] = float(tokens.sum())
    if len(seconds):
        row["seconds a step"] = float(seconds.median())
    return row
