"""A page of the study against its records: all figures of its tables computed anew, by other means than `compare`."""

import re
from functools import cache
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

STUDY = Path(__file__).resolve().parents[1] / "docs/study"
PAGE, RECORDS = STUDY / "groups_that_teach.md", STUDY / "groups_that_teach/runs"
BEST = "grpo_1e-4"
"""The row that the differences are taken to."""
KINDS = {
    "GRPO": "grpo",
    "DAPO's filter": "filter",
    "replay, random prefixes": "replay",
    "steered": "steered",
    "steered, prefixes only context": "steered_context",
}
"""How the page calls rows, and how their records are called before the rate."""
NUMBER = r"[+-]?[\d,]*\.?\d+"
INTERVAL = re.compile(rf"({NUMBER}) \(({NUMBER}) to ({NUMBER})\)")
SAMPLED = ("soup/train/continuation/tokens", "soup/cost/seed_tokens", "soup/cost/evicted_tokens")


@cache
def metrics(row: str, seed: int) -> Any:
    table = pd.read_parquet(RECORDS / row / f"seed_{seed}" / "metrics.parquet").astype({"metric": str})
    return table.pivot(index="step", columns="metric", values="value")


@cache
def pass_at(row: str, seed: int, k: int) -> np.ndarray:
    """Unbiased pass@k of each problem at the last validation, in the order of the problems' texts."""
    table: Any = pd.read_parquet(RECORDS / row / f"seed_{seed}" / "validation.parquet").astype({"problem": str})
    last = table[table["step"] == table["step"].max()].sort_values("problem")
    counts = last[["correct", "samples"]].to_numpy().tolist()
    return np.array([1 - comb(samples - correct, k) / comb(samples, k) for correct, samples in counts])


def signal(row: str, seed: int, column: str) -> float:
    """Share of groups with a signal, in the mean over the steps that the column's title names."""
    of_steps = metrics(row, seed)["soup/train/groups_with_signal"].dropna()
    steps = len(of_steps) if column.endswith("all steps") else int(column.split()[-2])
    return float(of_steps.tail(steps).mean())


def of_run(row: str, seed: int) -> dict[str, float]:
    """What the table by seed says of a run, by column."""
    told = metrics(row, seed)
    return {
        "accuracy": float(pass_at(row, seed, 1).mean()),
        "pass@16": float(pass_at(row, seed, 16).mean()),
        "entropy": float(told["soup/val/entropy"].dropna().iloc[-1]),
        "groups with a signal, last 40 steps": signal(row, seed, "last 40 steps"),
        "thousand tokens sampled": sum(float(told[name].sum()) for name in SAMPLED if name in told) / 1000,
    }


def differences(row: str, column: str) -> np.ndarray:
    """(seeds, problems) or (seeds, 1): this row minus the best of GRPO, for the seeds that both have."""
    seeds = sorted(int(p.name[5:]) for p in (RECORDS / row).iterdir() if (RECORDS / BEST / p.name).exists())
    if column.startswith("groups with a signal"):
        return np.array([[signal(row, seed, column) - signal(BEST, seed, column)] for seed in seeds])
    k = {"accuracy": 1, "pass@16": 16}[column]
    return np.stack([pass_at(row, seed, k) - pass_at(BEST, seed, k) for seed in seeds])


def table_of(head: str) -> dict[str, dict[str, str]]:
    """The page's table whose head begins like this: by row and column what stands there."""
    lines = PAGE.read_text().splitlines()
    [at] = [i for i, line in enumerate(lines) if line.startswith(head)]
    names = [cell.strip() for cell in lines[at].strip("|").split("|")]
    rows: dict[str, dict[str, str]] = {}
    for line in lines[at + 2 :]:
        if not line.startswith("|"):
            break
        title, *cells = (cell.strip().replace("**", "") for cell in line.strip("|").split("|"))
        [(kind, rate)] = re.findall(r"^(.*), (\de-\d)", title)
        rows[f"{KINDS[kind]}_{rate}"] = dict(zip(names[1:], cells, strict=True))
    return rows


def shown(text: str) -> tuple[float, float]:
    """A number as it is written, and half a unit of its last place."""
    places = len(text.partition(".")[2])
    return float(text.replace(",", "")), 0.5 * 10**-places


def test_each_seeds_figures_are_those_of_its_record() -> None:
    rows = table_of("| after 320 steps")
    assert set(rows) == {path.name for path in RECORDS.iterdir()}
    for row, cells in rows.items():
        for column, cell in cells.items():
            for seed, text in enumerate(cell.split(" / ")):
                value, half = shown(text)
                assert of_run(row, seed)[column] == pytest.approx(value, abs=half + 1e-6), (row, seed, column)


def test_differences_and_intervals_are_those_of_the_records() -> None:
    rng = np.random.default_rng(1)
    for row, cells in table_of("| | accuracy").items():
        for column, cell in cells.items():
            [texts], values = INTERVAL.findall(cell), differences(row, column)
            seeds, problems = values.shape
            means = [
                values[rng.integers(seeds, size=seeds)][:, rng.integers(problems, size=problems)].mean()
                for _ in range(4000)
            ]
            expected = (values.mean(), *np.quantile(means, (0.025, 0.975)))
            # Other draws give bounds that differ by a few thousandths, and the same mean.
            for text, want, slack in zip(texts, expected, (1e-6, 0.008, 0.008), strict=True):
                value, half = shown(text)
                assert want == pytest.approx(value, abs=half + slack), (row, column, text)
