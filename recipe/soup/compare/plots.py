"""The pictures of a comparison. Imports no verl."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def _by_segment(ending: str) -> Callable[[Result], list[pd.Series]]:
    """A metric of the loss on prefix and continuation, which are drawn solid and dotted."""
    return lambda result: [
        _of_prefixes(result.column(f"soup/loss/prefix/{ending}")),
        _smooth(result.column(f"soup/loss/continuation/{ending}")),
    ]


def _clip_fraction(result: Result) -> list[pd.Series]:
    sides = [_by_segment(f"clip_fraction/{side}")(result) for side in ("low", "high", "dual")]
    return [low.add(high, fill_value=0).add(dual, fill_value=0) for low, high, dual in zip(*sides, strict=True)]


CURVES: dict[str, Callable[[Result], list[pd.Series]]] = {
    "training reward": lambda result: [_smooth(result.column("critic/score/mean"))],
    "groups with signal": lambda result: [_smooth(result.column("soup/train/groups_with_signal"))],
    "validation accuracy": lambda result: [result.accuracy],
    "validation entropy (nats a token)": lambda result: [result.column("soup/val/entropy")],
    "mean ratio": _by_segment("ratio"),
    "KL to the sampling policy (k3, nats a token)": _by_segment("kl_k3"),
    "clip fraction": _clip_fraction,
    "effective sample size": _by_segment("effective_sample_size"),
}
STYLES = ("-", ":")


def curves(results: dict[str, list[Result]], path: Path) -> None:
    """One panel for each of `CURVES`: mean over seeds, and the band from the lowest to the highest."""
    figure, axes = plt.subplots(2, 4, figsize=(17, 7), constrained_layout=True)
    for axis, (title, curve) in zip(axes.flat, CURVES.items(), strict=True):
        for color, (name, runs) in enumerate(results.items()):
            for style, series in zip(STYLES, zip(*map(curve, runs), strict=True), strict=False):
                table = pd.concat(series, axis=1).dropna(how="all")
                if not table.empty:
                    marker, label = ("o" if "validation" in title else None), (name if style == STYLES[0] else None)
                    look: dict[str, Any] = {"color": f"C{color}", "linestyle": style, "marker": marker, "markersize": 4}
                    axis.plot(table.index, table.mean(axis=1), label=label, **look)
                    axis.fill_between(
                        table.index, table.min(axis=1), table.max(axis=1), alpha=0.15, color=f"C{color}", linewidth=0
                    )
        if not axis.lines:  # the real path measures no validation entropy, a run without mixing no prefixes
            axis.text(0.5, 0.5, "not measured, or always 0", ha="center", color="gray", transform=axis.transAxes)
        axis.set_title(title, fontsize="medium")
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize="small")
    figure.suptitle("second row: solid on the prefix, dotted on the continuation", fontsize="medium")
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
