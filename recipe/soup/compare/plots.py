"""The pictures of a comparison. Imports no verl."""

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd

from recipe.soup.compare.results import Result, generated_tokens, pass_curve

SMOOTH = 10
"""Steps over which training metrics are averaged."""


def _of_prefixes(series: pd.Series) -> pd.Series:
    """Without the steps that had no prefix, which report zeros."""
    steps = [step for step, value in series.items() if value > 0]
    return _smooth(pd.Series(series.loc[steps[0] :])) if steps else pd.Series(dtype=float)


def _smooth(series: pd.Series) -> pd.Series:
    return pd.Series(series.rolling(SMOOTH, min_periods=1).mean())


CURVES: dict[str, Callable[[Result], pd.Series]] = {
    "training reward": lambda result: _smooth(result.column("critic/score/mean")),
    "groups with signal": lambda result: _smooth(result.column("soup/train/groups_with_signal")),
    "validation accuracy": lambda result: result.accuracy,
    "validation entropy (nats a token)": lambda result: result.column("soup/val/entropy"),
    "prefix: effective sample size": lambda result: _of_prefixes(
        result.column("soup/loss/prefix/effective_sample_size")
    ),
    "prefix: clipped share of the gradient": lambda result: _of_prefixes(
        result.column("soup/loss/prefix/gradient_clipped")
    ),
}


def curves(results: dict[str, list[Result]], path: Path) -> None:
    """One panel for each of `CURVES`: mean over seeds, and the band from the lowest to the highest."""
    figure, axes = plt.subplots(2, 3, figsize=(14, 7), constrained_layout=True)
    for axis, (title, curve) in zip(axes.flat, CURVES.items(), strict=True):
        for color, (name, runs) in enumerate(results.items()):
            table = pd.concat([curve(run) for run in runs], axis=1)
            if not table.dropna(how="all").empty:
                marker = "o" if "validation" in title else None
                axis.plot(table.index, table.mean(axis=1), label=name, color=f"C{color}", marker=marker, markersize=4)
                axis.fill_between(
                    table.index, table.min(axis=1), table.max(axis=1), alpha=0.15, color=f"C{color}", linewidth=0
                )
        if not axis.lines:  # the real path measures no validation entropy, a run without mixing no prefixes
            axis.text(0.5, 0.5, "not measured, or always 0", ha="center", color="gray", transform=axis.transAxes)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes.flat[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def outcomes(results: dict[str, list[Result]], path: Path) -> None:
    """pass@k before and after training, and accuracy against tokens generated and against time."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), constrained_layout=True)
    for color, (name, runs) in enumerate(results.items()):
        after = pd.DataFrame([pass_curve(run.after) for run in runs])
        if not after.empty:
            axes[0].plot(after.columns, after.mean(), label=name, color=f"C{color}", marker="o", markersize=4)
            axes[0].fill_between(after.columns, after.min(), after.max(), alpha=0.15, color=f"C{color}", linewidth=0)
        for axis, cost in ((axes[1], generated_tokens), (axes[2], lambda run: run.column("timing_s/step"))):
            for run in runs:
                spent = cost(run).cumsum()
                at = {step: value for step, value in run.accuracy.items() if step == 0 or step in spent.index}
                where = [spent.get(step, 0.0) for step in at]
                axis.plot(where, list(at.values()), color=f"C{color}", marker="o", markersize=3, alpha=0.7)
    before = [run for runs in results.values() for run in runs if len(run.before)]
    if before:
        start = pd.DataFrame([pass_curve(run.before) for run in before]).mean()
        axes[0].plot(start.index, start, color="gray", linestyle="--", label="before training")
        axes[0].set_xscale("log", base=2)
        axes[0].set_xticks(start.index, [str(k) for k in start.index])
    axes[0].legend()
    for axis, title, label in zip(
        axes,
        ("pass@k after training", "accuracy against cost", "accuracy against time"),
        ("k", "tokens generated", "seconds of training steps"),
        strict=True,
    ):
        axis.set_title(title)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
