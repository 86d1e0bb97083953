"""Write the table of an evaluation, and draw its picture."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from recipe.soup.records.intervals import mean_interval
from recipe.soup.records.majority import majority_at_k
from recipe.soup.records.pass_at_k import pass_at_k, powers_of_two
from recipe.soup.tools import pictures  # noqa: F401
from recipe.soup.tools.compare.report import as_interval, as_markdown


def measures(samples: pd.DataFrame) -> dict[str, np.ndarray]:
    """Compute pass@k and, where answers are known, maj@k of each problem."""
    groups = [group for _, group in samples.groupby("problem")]
    n = min(len(group) for group in groups)
    found = {}
    for k in powers_of_two(n):
        found[f"pass@{k}"] = np.array([pass_at_k(len(group), int((group.acc > 0).sum()), k) for group in groups])
    if "pred" in samples:
        rng = np.random.default_rng(0)
        for k in powers_of_two(n)[1:]:
            found[f"maj@{k}"] = np.array(
                [
                    majority_at_k(group.pred.fillna("").astype(str).tolist(), (group.acc > 0).tolist(), k, rng)
                    for group in groups
                ]
            )
    return found


def row(samples: pd.DataFrame, shown: dict[str, np.ndarray]) -> dict[str, str]:
    """Make the table's row of a dataset; pass@k and maj@k have the 95 % bootstrap interval over problems."""
    figures = {"problems": str(samples.problem.nunique()), "samples": str(len(samples))}
    figures |= {name: as_interval(mean_interval([values])) for name, values in shown.items()}
    figures["tokens"] = f"{samples.tokens.mean():,.0f}"
    figures["cut off"] = f"{(samples.finish_reason == 'length').mean():.1%}"
    return figures


def write_table(tables: dict[str, pd.DataFrame], settings: dict[str, Any], out: Path) -> list[Path]:
    """Print and write `report.md`, and draw `pass_at_k.png`.

    Args:
        tables: samples by dataset.
        settings: how they were sampled.

    Returns:
        paths of the files.
    """
    found = {name: measures(samples) for name, samples in tables.items()}
    rows = {name: row(samples, found[name]) for name, samples in tables.items()}
    text = as_markdown(pd.DataFrame.from_dict(rows, orient="index").fillna(""))
    facts = ", ".join(f"{key} {value}" for key, value in settings.items())
    legend = f"In parentheses the 95 % bootstrap interval over problems. Sampled with {facts}."
    report = f"# {settings['model']}\n\n{text}\n\n{legend}\n"
    print(report)
    (out / "report.md").write_text(report + "\n![pass@k](pass_at_k.png)\n", encoding="utf-8")
    figure, axis = plt.subplots(figsize=(6, 4), constrained_layout=True)
    for color, (name, values) in enumerate(found.items()):
        for kind, style in (("pass@", "-"), ("maj@", ":")):
            curve = {int(key.removeprefix(kind)): value.mean() for key, value in values.items() if key.startswith(kind)}
            if curve:  # not every reward gives answers to vote on
                label = f"{name} {kind}k"
                axis.plot(list(curve), list(curve.values()), style, label=label, color=f"C{color}", marker=".")
    axis.set_xscale("log", base=2)
    ks = powers_of_two(max(len(group) for samples in tables.values() for _, group in samples.groupby("problem")))
    axis.set_xticks(ks, [str(k) for k in ks])
    axis.set_xlabel("k")
    axis.set_ylim(0, 1)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(out / "pass_at_k.png", dpi=110)
    plt.close(figure)
    return [out / "report.md", out / "pass_at_k.png", *(out / f"{name}.jsonl" for name in tables)]
