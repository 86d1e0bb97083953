"""`soup-verl plot`: one picture of one run, from its own logs."""

import argparse
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.backend_bases import FigureCanvasBase

from recipe.soup.errors import refuse
from recipe.soup.records.metrics_file import metrics_of, read_metrics
from recipe.soup.tools import pictures
from recipe.soup.tools.outputs import check_file

EXAMPLES = """examples:
  soup-verl plot runs/countdown/soup.jsonl
  soup-verl plot runs/qwen3-4b/soup --out soup.png
"""
SMOOTH = 5
"""Number of steps over which metrics of training are averaged."""
PANELS: dict[str, dict[str, str]] = {
    "accuracy (unmixed validation)": {"^val-core/.*/mean@": "mean", "^soup/val/greedy$": "greedy"},
    "pass@16 (unmixed validation)": {"/pass@16$": "pass@16", "/pass@4$": "pass@4"},
    "entropy, nats a token": {"soup/val/entropy": "validation", "actor/entropy": "training"},
    "reward in training": {
        "soup/train/reward/pure": "current policy only",
        "soup/train/reward/mixed$": "with a prefix",
        "critic/score/mean": "all",
    },
    "groups with signal": {"soup/train/groups_with_signal": "share of prompts"},
    "ratio at the start of the update, prefix": {
        "prefix/ratio_at_start/max": "largest",
        "prefix/ratio_at_start/mean": "mean",
        "prefix/ratio_at_start/min": "smallest",
    },
    "clipped share of the gradient": {
        "prefix/gradient_clipped": "prefix",
        "continuation/gradient_clipped": "continuation",
    },
    "lag, updates": {"soup/train/prefix/lag/mean": "mean", "soup/train/prefix/lag/max": "largest"},
    "prefix tokens, share of all trained": {"soup/train/prefix/share": "share"},
}
"""Panels by title; the curves of each by a regular expression for the metric's name."""
OUTER = "^val-core/|^soup/val/|/[^/]*/mean@.*$|/pass@.*$"
LOGARITHMIC = ("ratio",)
OF_PREFIXES = "prefix/(?!share)|reward/mixed$"
"""Metrics that are 0 in a step without prefixes."""
TOKENS = "soup/train/prefix/tokens"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `soup-verl plot`."""
    parser.add_argument("run", type=Path, help="metrics of a run (<project>/<experiment>.jsonl), or its folder")
    parser.add_argument("--out", type=Path, help="picture (default: beside the metrics, .png)")


def plot(args: argparse.Namespace) -> None:
    """Draw a run: accuracy, pass@k, entropy of unmixed validation; ratios, clipping, lag, prefixes in training."""
    if args.out:
        check_file("--out", args.out)
        known = FigureCanvasBase.get_supported_filetypes()
        if args.out.suffix.removeprefix(".") not in known:
            raise refuse(
                "--out", args.out, f"no picture ends so; choose among {', '.join(f'.{end}' for end in known)}."
            )
    print(draw_run(metrics_of(args.run), args.out))


def draw_run(path: Path, out: Path | None = None) -> Path:
    """Draw the run whose metrics are at `path`; returns the picture's path, beside them if `out` is None."""
    out = out or path.with_suffix(".png")
    draw(pd.DataFrame(read_metrics(path)).T.sort_index(), path.stem, out)
    return out


def draw(metrics: pd.DataFrame, title: str, out: Path) -> None:
    """Draw a panel for each of `PANELS`; what a run did not measure is left out."""
    figure, axes = plt.subplots(3, 3, figsize=(14, 9), constrained_layout=True)
    for axis, (name, curves) in zip(axes.flat, PANELS.items(), strict=True):
        for part, label in curves.items():
            found = [column for column in metrics.columns if re.search(part, column)]
            for column in found:
                values = pd.Series(metrics[column].dropna())
                if re.search(OF_PREFIXES, column) and TOKENS in metrics:
                    values = pd.Series(values[metrics.loc[values.index, TOKENS] > 0])
                values = pd.Series(values[values > 0]) if name.startswith(LOGARITHMIC) else values
                validates = column.startswith("val") or "/val/" in column
                if not validates:
                    values = pd.Series(values.rolling(SMOOTH, min_periods=1).mean())
                if len(values):
                    # Only validation metrics come once for each data source, whose name is in the middle of theirs.
                    shown = f"{label} ({re.sub(OUTER, '', column)})" if len(found) > 1 else label
                    axis.plot(values.index, values, marker="o" if validates else None, markersize=4, label=shown)
        if axis.lines:
            axis.legend(fontsize="small")
        else:
            axis.text(0.5, 0.5, "not measured", ha="center", color="gray", transform=axis.transAxes)
        if axis.lines and name.startswith(LOGARITHMIC):
            pictures.logarithmic(axis)
        axis.set_title(name, fontsize="medium")
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    figure.suptitle(f"{title}: validation as points, training averaged over {SMOOTH} steps")
    figure.savefig(out, dpi=110)
    plt.close(figure)
