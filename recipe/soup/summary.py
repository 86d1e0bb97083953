"""Prints what a run did, from the metrics that verl's file logger wrote.

Example:
    python -m recipe.soup.summary runs/countdown/soup.jsonl
"""

import argparse
from pathlib import Path
from statistics import median

from recipe.soup.json_lines import read_json_lines

PHASES = ("gen", "old_log_prob", "adv", "update_actor", "update_weights", "save_checkpoint")


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """Metrics by step; step 0 is the validation before training."""
    return {entry["step"]: entry["data"] for entry in read_json_lines(path)}


def validation_accuracy(metrics: dict[int, dict[str, float]]) -> dict[int, float]:
    """Mean accuracy of unmixed validation, over data sources, by the step after which it was measured."""
    found = {
        step: [value for key, value in values.items() if key.startswith("val-core/") and "/mean@" in key]
        for step, values in metrics.items()
    }
    return {step: sum(values) / len(values) for step, values in found.items() if values}


def summary(path: Path) -> str:
    """A few lines about one run: accuracy, where a step's time goes, ratios, and where everything is."""
    metrics = read_metrics(path)
    steps = [values for step, values in sorted(metrics.items()) if "timing_s/step" in values]
    lines = [f"{path}: {len(steps)} steps"]
    accuracy = validation_accuracy(metrics)
    if accuracy:
        curve = ", ".join(f"{value:.3f} after step {step}" for step, value in sorted(accuracy.items()))
        lines.append(f"  validation accuracy (unmixed): {curve}")
    if steps:
        phases = [(phase, [s[f"timing_s/{phase}"] for s in steps if f"timing_s/{phase}" in s]) for phase in PHASES]
        times = ", ".join(f"{phase} {median(values):.2f}" for phase, values in phases if values)
        lines.append(f"  seconds a step (median): {median(s['timing_s/step'] for s in steps):.2f}, of which {times}")
        mixed = [s for s in steps if s.get("soup/train/prefix/tokens")]
        if mixed:
            shares = median(s["soup/train/prefix/share"] for s in mixed)
            largest = max(s["soup/train/prefix/ratio_at_start/max"] for s in mixed)
            mismatch = max(s["soup/train/continuation/engine_mismatch/max"] for s in mixed)
            lines.append(
                f"  historical share of the trained tokens (median): {shares:.0%}; largest ratio {largest:.2f}"
            )
            lines.append(f"  largest mismatch between rollout engine and trainer: {mismatch:.1e} nats")
    folder = path.with_suffix("")
    lines.append(f"  samples in {folder / 'samples'}, checkpoints in {folder / 'checkpoints'}, metrics in {path}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", type=Path, nargs="+", help="<project>/<experiment>.jsonl of verl's file logger")
    for path in parser.parse_args().metrics:
        print(summary(path))


if __name__ == "__main__":
    main()
