"""Keep finished runs in records that are small enough to commit, so that a study need not run them again elsewhere.

A record is a folder like the run's own, with two tables in place of logs and samples.
"""

import re
from pathlib import Path

import pandas as pd

from recipe.soup.tools.compare.one_run import Run
from recipe.soup.tools.compare.results import Counts, Result, read_result

METRICS, VALIDATION = "metrics.parquet", "validation.parquet"
KEPT = re.compile(
    r"^val-core/|^soup/val/|^critic/score/mean$|^actor/entropy$|^soup/train/groups_with_signal$"
    r"|^soup/train/continuation/tokens$|^soup/cost/(seed|evicted)_tokens$|^soup/verified/|^timing_s/step$"
    r"|^perf/total_num_tokens$|^prompt_length/mean$|^response_length/mean$"
)
"""Metrics that are kept: the tables and the first row of the curves need them."""
FLOAT = "float32"


def read_run(run: Run) -> Result:
    """Read a finished run from what it wrote itself."""
    return read_result(run.name, run.seed, run.metrics, run.validation)


def is_recorded(run: Run, records: Path | None) -> bool:
    """Whether this run was kept, with the same settings."""
    return records is not None and run.elsewhere(records).is_done


def write_record(run: Run, result: Result, records: Path) -> Path:
    """Keep a finished run's metrics by step, and the correct samples of each problem at each validation."""
    record = run.elsewhere(records)
    record.folder.mkdir(parents=True, exist_ok=True)
    metrics = [
        (step, key, value)
        for step, values in sorted(result.metrics.items())
        for key, value in values.items()
        if KEPT.search(key)
    ]
    table = pd.DataFrame(metrics, columns=["step", "metric", "value"]).astype({"metric": "category", "value": FLOAT})
    table.to_parquet(record.folder / METRICS, compression="zstd")
    counts = [
        (step, problem, correct, samples)
        for step, problems in sorted(result.validations.items())
        for problem, (correct, samples) in problems.items()
    ]
    table = pd.DataFrame(counts, columns=["step", "problem", "correct", "samples"]).astype({"problem": "category"})
    table.to_parquet(record.folder / VALIDATION, compression="zstd")
    record.mark_done()
    return record.folder


def read_record(run: Run, records: Path) -> Result:
    """Read a run that `write_record` kept."""
    folder = run.elsewhere(records).folder
    metrics: dict[int, dict[str, float]] = {}
    for step, key, value in pd.read_parquet(folder / METRICS).itertuples(index=False):
        metrics.setdefault(step, {})[key] = float(value)
    validations: dict[int, Counts] = {}
    for step, problem, correct, samples in pd.read_parquet(folder / VALIDATION).itertuples(index=False):
        validations.setdefault(step, {})[problem] = (correct, samples)
    return Result(run.name, run.seed, metrics, validations)
