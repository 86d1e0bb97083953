"""Draw the pictures of a comparison."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from recipe.soup.records.pass_at_k import PASS_AT
from recipe.soup.tools import pictures  # noqa: F401
from recipe.soup.tools.compare.results import Result, generated_tokens, pass_curve

SMOOTH = 10
"""Number of steps over which training metrics are averaged."""


def _smooth(series: pd.Series) -> pd.Series:
    return pd.Series(series.rolling(SMOOTH, min_periods=1).mean())


def _by_segment(ending: str) -> Callable[[Result], list[pd.Series]]:
    """Return the curves of a loss metric: solid for the prefix, dotted for the continuation.

    Steps without a token there report zeros, and are left out.
    """

    def curves(result: Result) -> list[pd.Series]:
        drawn = []
        for segment in ("prefix", "continuation"):
            tokens = result.column(f"soup/loss/{segment}/tokens").to_dict()
            values = result.column(f"soup/loss/{segment}/{ending}").to_dict()
            drawn.append(_smooth(pd.Series({s: v for s, v in values.items() if tokens.get(s)}, dtype=float)))
        return drawn

    return curves


def _clip_fraction(result: Result) -> list[pd.Series]:
    sides = [_by_segment(f"clip_fraction/{side}")(result) for side in ("low", "high", "dual")]
    return [low.add(high, fill_value=0).add(dual, fill_value=0) for low, high, dual in zip(*sides, strict=True)]


def _largest_pass(result: Result) -> list[pd.Series]:
    measured = [k for k in PASS_AT if len(result.column(f"pass@{k}"))]
    return [result.column(f"pass@{measured[-1]}")] if measured else [pd.Series(dtype=float)]


CURVES: dict[str, Callable[[Result], list[pd.Series]]] = {
    "training reward": lambda result: [_smooth(result.column("critic/score/mean"))],
    "groups with signal": lambda result: [_smooth(result.column("soup/train/groups_with_signal"))],
    "validation accuracy": lambda result: [result.accuracy],
    "validation pass@k, largest k": _largest_pass,
    "validation entropy (nats a token)": lambda result: [result.column("soup/val/entropy")],
    "mean ratio": _by_segment("ratio"),
    "KL to the sampling policy (k3, nats a token)": _by_segment("kl_k3"),
    "clip fraction": _clip_fraction,
    "effective sample size": _by_segment("effective_sample_size"),
}
BY_SEGMENT = ("mean ratio", "clip fraction")
"""Curves that have a line for the prefix and one for the continuation; a run measures both or neither."""
COLUMNS = 4
STYLES = ("-", ":")
LEGIBLE = 10
"""Number of runs that a legend of ordinary size can name."""


def _colors(results: dict[str, list[Result]]) -> dict[str, Any]:
    palette = plt.get_cmap("tab10" if len(results) <= LEGIBLE else "tab20")
    return {name: palette(i % palette.N) for i, name in enumerate(results)}


def curves(results: dict[str, list[Result]], path: Path) -> None:
    """Draw a panel for each of `CURVES` that was measured: mean over seeds, with a band from lowest to highest."""
    all_runs = [run for runs in results.values() for run in runs]
    panels = {title: curve for title, curve in CURVES.items() if any(len(s) for run in all_runs for s in curve(run))}
    rows = max(-(-len(panels) // COLUMNS), 1)  # killed before their first step, runs have measured nothing
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(17, 3.5 * rows), constrained_layout=True, squeeze=False)
    colors = _colors(results)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, curve) in zip(axes.flat, panels.items(), strict=False):
        for name, runs in results.items():
            for style, series in zip(STYLES, zip(*map(curve, runs), strict=True), strict=False):
                # Sorted by step, since seeds may begin to clip at different steps.
                table = pd.concat(series, axis=1).dropna(how="all").sort_index()
                if not table.empty:
                    marker, label = ("o" if "validation" in title else None), (name if style == STYLES[0] else None)
                    look: dict[str, Any] = {
                        "color": colors[name],
                        "linestyle": style,
                        "marker": marker,
                        "markersize": 4,
                    }
                    axis.plot(table.index, table.mean(axis=1), label=label, **look)
                    axis.fill_between(
                        table.index, table.min(axis=1), table.max(axis=1), alpha=0.15, color=colors[name], linewidth=0
                    )
        axis.set_title(title, fontsize="medium")
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize="small" if len(results) <= LEGIBLE else "xx-small", ncols=1 + len(results) // LEGIBLE)
    if any(title in panels for title in BY_SEGMENT):
        figure.suptitle("of the loss: solid on the prefix, dotted on the continuation", fontsize="medium")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def outcomes(results: dict[str, list[Result]], path: Path) -> None:
    """Draw pass@k before and after training, and accuracy against diversity, tokens generated and time."""
    figure, axes = plt.subplots(2, 2, figsize=(14, 10), constrained_layout=True)
    by_k, frontier, by_tokens, by_time = axes.flat
    colors = _colors(results)
    for name, runs in results.items():
        after = pd.DataFrame([pass_curve(run.after) for run in runs])
        if not after.empty:
            by_k.plot(after.columns, after.mean(), label=name, color=colors[name], marker="o", markersize=4)
            by_k.fill_between(after.columns, after.min(), after.max(), alpha=0.15, color=colors[name], linewidth=0)
            most = after.columns[-1]
            frontier.scatter(after[most], after[1], color=colors[name], s=8, alpha=0.6)
            frontier.scatter(after[most].mean(), after[1].mean(), color=colors[name], s=60, label=name)
            frontier.annotate(name, (after[most].mean(), after[1].mean()), fontsize="small", textcoords="offset points",
                              xytext=(6, 4))  # fmt: skip
            frontier.set_xlabel(f"pass@{most}")
        for axis, cost in ((by_tokens, generated_tokens), (by_time, lambda run: run.column("timing_s/step"))):
            for run in runs:
                spent = cost(run).cumsum()
                at = {step: value for step, value in run.accuracy.items() if step == 0 or step in spent.index}
                where = [spent.get(step, 0.0) for step in at]
                axis.plot(where, list(at.values()), color=colors[name], marker="o", markersize=3, alpha=0.7)
    before = [run for runs in results.values() for run in runs if len(run.before)]
    if before:
        start = pd.DataFrame([pass_curve(run.before) for run in before]).mean()
        by_k.plot(start.index, start, color="gray", linestyle="--", label="before training")
        by_k.set_xscale("log", base=2)
        by_k.set_xticks(start.index, [str(k) for k in start.index])
        frontier.scatter(start.iloc[-1], start.iloc[0], color="gray", marker="x", label="before training")
    drawn = by_k.get_legend_handles_labels()[0]  # nothing, of logs without the validation's samples
    if drawn and len(results) <= LEGIBLE:  # with more, the names are beside their points only
        by_k.legend(fontsize="small")
    for axis, title, label in (
        (by_k, "pass@k after training", "k"),
        (frontier, "accuracy against diversity: small points are seeds", frontier.get_xlabel()),
        (by_tokens, "accuracy against cost", "tokens generated"),
        (by_time, "accuracy against time", "seconds of training steps"),
    ):
        axis.set_title(title)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)
