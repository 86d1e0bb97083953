"""`soup-verl summary`: what a run did, from the metrics that verl's file logger wrote; every run ends with it."""

import argparse
import re
from pathlib import Path
from statistics import mean, median

from recipe.soup.records.metrics_file import metrics_of, read_metrics

EXAMPLES = """example:
  soup-verl summary runs/countdown/soup runs/countdown/grpo
"""
PHASES = ("gen", "old_log_prob", "adv", "update_actor", "update_weights", "save_checkpoint")
VALIDATION = {"^val-core/.*/mean@": "accuracy", r"^soup/val/.*pass@(\d+)$": "pass@{}", "^soup/val/entropy$": "entropy"}
"""Rows of the table, by the metrics whose mean over data sources they show; all from unmixed validation."""
TRAINING = {"critic/score/mean": "reward", "soup/train/groups_with_signal": "groups with signal"}
QUARTER = 4


def _validation_rows(values: dict[str, float]) -> dict[str, float]:
    """Return the table's rows for one validation, as means over data sources."""
    found: dict[str, list[float]] = {}
    for pattern, name in VALIDATION.items():
        for key, value in values.items():
            if match := re.search(pattern, key):
                found.setdefault(name.format(*match.groups()), []).append(value)
    return {name: mean(numbers) for name, numbers in found.items()}


def _table(metrics: dict[int, dict[str, float]]) -> list[str]:
    """Compare before and after: the first and the last validation, the first and the last quarter of training."""
    lines = []
    validated = sorted(step for step, values in metrics.items() if _validation_rows(values))
    if validated:
        ends = sorted({validated[0], validated[-1]})
        columns = [_validation_rows(metrics[step]) for step in ends]
        lines.append(f"  {'validation, never mixed':<26}" + "".join(f"{f'step {step}':>12}" for step in ends))
        for name in columns[-1]:
            numbers = "".join(f"{column[name]:>12.3f}" if name in column else f"{'':>12}" for column in columns)
            lines.append(f"    {name:<24}{numbers}")
    trained = [values for step, values in sorted(metrics.items()) if "timing_s/step" in values]
    size = len(trained) // QUARTER
    if size:
        lines.append(f"  {'training, as it was mixed':<26}{'first 1/4':>12}{'last 1/4':>12}")
        for key, name in TRAINING.items():
            ends = [[values[key] for values in part if key in values] for part in (trained[:size], trained[-size:])]
            if all(ends):
                lines.append(f"    {name:<24}{mean(ends[0]):>12.3f}{mean(ends[1]):>12.3f}")
    return lines


def summary(path: Path, places: dict[str, str]) -> str:
    """Write a few lines about a run: before and after, where a step's time goes, ratios, and where everything is.

    Args:
        path: the metrics.
        places: where other things are, by what they are.
    """
    metrics = read_metrics(path)
    steps = [values for step, values in sorted(metrics.items()) if "timing_s/step" in values]
    lines = [f"{path}: {len(steps)} steps", *_table(metrics)]
    if steps:
        phases = [(phase, [s[f"timing_s/{phase}"] for s in steps if f"timing_s/{phase}" in s]) for phase in PHASES]
        times = ", ".join(f"{phase} {median(values):.2f}" for phase, values in phases if values)
        lines.append(f"  seconds a step (median): {median(s['timing_s/step'] for s in steps):.2f}, of which {times}")
        mixed = [s for s in steps if s.get("soup/train/prefix/tokens")]
        if mixed:
            shares = median(s["soup/train/prefix/share"] for s in mixed)
            lines.append(f"  historical share of the trained tokens (median): {shares:.0%}")
            names = ("soup/train/prefix/ratio_at_start/max", "soup/train/continuation/engine_mismatch/max")
            ratios, mismatches = ([s[name] for s in mixed if name in s] for name in names)
            if ratios and mismatches:  # verl's bypass_mode has none
                differ = f"rollout engine and trainer differ by {max(mismatches):.1e} nats"
                lines.append(f"  largest ratio {max(ratios):.2f}; {differ}")
    return "\n".join([*lines, *(f"  {what} in {place}" for what, place in places.items())])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `soup-verl summary`."""
    parser.add_argument("runs", type=Path, nargs="+", help="metrics (<project>/<experiment>.jsonl), or folders of runs")


def print_summaries(args: argparse.Namespace) -> None:
    """Say in a few lines what each run did."""
    for path in map(metrics_of, args.runs):
        folders = {name: path.with_suffix("") / name for name in ("samples", "validation", "checkpoints")}
        print(summary(path, {name: str(folder) for name, folder in folders.items() if folder.is_dir()}))
