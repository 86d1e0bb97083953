"""Ratios with intervals, the table and the plot of the step-cost benchmark."""

import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

BOOTSTRAPS = 10_000
LABELS = {
    "step": "whole step",
    "gen": "generation",
    "old_log_prob": "old log-probs",
    "adv": "advantage",
    "update_actor": "update",
    "update_weights": "weight sync",
    "save_checkpoint": "checkpoint",
}


def machine() -> str:
    """What the figures were measured on."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, torch {torch.__version__}"
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":")[1].strip()
    return f"{torch.get_num_threads()} cores of {model}, shared with others; torch {torch.__version__}"


def interval(values: list[float]) -> tuple[float, float, float]:
    """Median of the values, and its 95 % bootstrap interval."""
    draws = np.random.default_rng(0).choice(values, (BOOTSTRAPS, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return float(np.median(values)), float(low), float(high)


def ratio(pairs: list[list[float]]) -> tuple[float, float, float]:
    """Median of the pairs' ratios mixed / unmixed, and its 95 % bootstrap interval."""
    return interval([mixed / unmixed for unmixed, mixed in pairs])


def overhead(seconds: dict[str, list[list[float]]]) -> tuple[float, float, float]:
    """What mixing adds to a step, as a share of an unmixed step's generation: median and interval."""
    both = zip(seconds["step"], seconds["gen"], strict=True)
    return interval([(mixed - unmixed) / generation for (unmixed, mixed), (generation, _) in both])


def render(folder: Path) -> str:
    """Write `step_cost.md` and `step_cost.png` of all results in a folder; returns the table."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("step_cost_*.json"))]
    if not results:
        return f"no results in {folder}"
    lines = [_table(result) for result in results]
    text = "# What a mixed step costs against an unmixed one\n\n" + "\n".join(lines)
    (folder / "step_cost.md").write_text(text + "\n![ratios by phase](step_cost.png)\n")
    _plot(results, folder / "step_cost.png")
    return text


def _table(result: dict[str, Any]) -> str:
    pairs = len(result["seconds"]["step"])
    rows = [
        f"## {result['label']}\n",
        f"`{result['command']}`: {pairs} counted pairs of blocks, on {result['machine']}.\n",
        "| phase | unmixed, s | mixed / unmixed | 95 % interval |\n|---|---|---|---|",
    ]
    for phase, values in result["seconds"].items():
        if all(unmixed > 1e-3 for unmixed, _ in values):
            middle, low, high = ratio(values)
            unmixed = np.median([value for value, _ in values])
            rows.append(f"| {LABELS[phase]} | {unmixed:.3f} | {middle:.3f} | {low:.3f} to {high:.3f} |")
    if "gen" in result["seconds"]:
        middle, low, high = overhead(result["seconds"])
        rows.append(f"\nMixing adds {middle:.1%} of generation to a step ({low:.1%} to {high:.1%}).")
    if speeds := result.get("tokens_per_second"):
        unmixed, mixed = np.median(np.array(speeds), axis=0)
        rows.append(f"Tokens a second: {unmixed:,.0f} unmixed, {mixed:,.0f} mixed.")
    if (memory := result.get("trainer_gib", {})) and any(memory.values()):
        rows.append(f"The trainer's memory: {memory['allocated']:.1f} GiB, {memory['reserved']:.1f} GiB reserved.")
    trained = result["prefix_tokens"] + result["continuation_tokens"]
    rows.append(
        f"\nA mixed step (medians): {result['mixed_samples']:.0f} mixed samples; {result['prefix_tokens']:.0f} of "
        f"{trained:.0f} trained tokens are historical; {result['extra_requests']:.0f} requests and "
        f"{result['extra_tokens']:.0f} tokens for prefixes; {result['spared_requests']:.0f} requests spared by "
        f"prefixes that are complete. Largest bank {result['bank_bytes'] / 1e3:.1f} kB, snapshots "
        f"{result['snapshot_bytes'] / 1e6:.1f} MB, written in {result['snapshot_seconds']:.3f} s.\n"
    )
    return "\n".join(rows)


def _plot(results: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    phases = [phase for phase in LABELS if any(phase in result["seconds"] for result in results)]
    phases = [phase for phase in phases if phase != "adv"]  # milliseconds
    figure, axes = plt.subplots(figsize=(7, 0.5 + 0.7 * len(phases)), layout="constrained")
    for i, result in enumerate(results):
        for row, phase in enumerate(phases):
            if phase in result["seconds"]:
                middle, low, high = ratio(result["seconds"][phase])
                place = row + 0.2 * (i - (len(results) - 1) / 2)
                label = result["label"] if row == 0 else None
                error = [[middle - low], [high - middle]]
                axes.errorbar(middle, place, xerr=error, fmt="o", color=f"C{i}", capsize=3, label=label)
    axes.axvline(1.0, color="0.4", linewidth=1)
    axes.axvline(1.27, color="0.6", linewidth=1, linestyle=":")
    place = {"transform": axes.get_xaxis_transform(), "rotation": 90, "ha": "right", "va": "bottom"}
    axes.text(1.265, 0.02, "the paper's whole step", color="0.4", fontsize=8, **place)
    axes.set_yticks(range(len(phases)), [LABELS[phase] for phase in phases])
    axes.invert_yaxis()
    axes.set_xlabel("time of a mixed step / time of an unmixed one (median, 95 % interval)")
    figure.legend(loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=150)
    plt.close(figure)
