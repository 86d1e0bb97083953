"""Write the report of a comparison: tables, pictures and a page."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader

from recipe.soup.records.intervals import mean_interval, paired_interval
from recipe.soup.records.pass_at_k import PASS_AT
from recipe.soup.tools.compare.plots import curves, outcomes
from recipe.soup.tools.compare.results import Result, figures, per_problem, tries
from recipe.soup.tools.outputs import make_folder

ONE_A_RUN = ("greedy", "entropy", "training groups with signal")
"""Figures that are one number for a run, so that intervals of their differences are over seeds alone."""
WHOLE = "After training"
"""Title of the table of runs that are of the same length."""
PICTURES = {"curves.png": "While training", "outcomes.png": "Outcomes"}


def as_interval(interval: tuple[float, float, float], sign: str = "") -> str:
    """Write a mean with the lower and the upper end of its interval."""
    mean, low, high = interval
    return f"{mean:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


def shared_problems(runs: list[Result]) -> list[str]:
    """Return the validation problems that all the runs have."""
    return sorted(set.intersection(*(set(run.after) for run in runs))) if runs else []


def end_table(results: dict[str, list[Result]]) -> pd.DataFrame:
    """Make a row for each configuration: pass@k with intervals, the other figures as means over seeds."""
    rows = {}
    for name, runs in results.items():
        problems = shared_problems(runs)
        row = {"seeds": str(len(runs)), "problems": str(len(problems))}
        for key, value in pd.DataFrame([figures(run) for run in runs]).mean().items():
            text = str(key)
            row[text] = f"{value:,.0f}" if value > 1000 else f"{value:.3f}"
            if text.startswith("pass@") and problems:
                k = int(text.removeprefix("pass@"))
                row[text] = as_interval(mean_interval([per_problem(run.after, k, problems) for run in runs]))
        rows[name] = row
    return pd.DataFrame.from_dict(rows, orient="index").fillna("")


def difference_table(results: dict[str, list[Result]], baseline: str) -> pd.DataFrame:
    """Subtract from each run its twin with the same seed: pass@k on problems that both have, and `ONE_A_RUN`."""
    twins = {run.seed: run for run in results[baseline]}
    rows = {}
    for name, runs in results.items():
        pairs = [(run, twins[run.seed]) for run in runs if run.seed in twins]
        both = [run for pair in pairs for run in pair]
        problems = shared_problems(both)
        if name != baseline and problems:
            rows[name] = {"pairs": str(len(pairs)), "problems": str(len(problems))}
            for k in (k for k in PASS_AT if k <= min(tries(run.after) for run in both)):
                ours, theirs = ([per_problem(pair[i].after, k, problems) for pair in pairs] for i in (0, 1))
                rows[name][f"pass@{k}"] = as_interval(paired_interval(ours, theirs), "+")
            ends = [tuple(figures(run) for run in pair) for pair in pairs]
            for key in ONE_A_RUN:
                if all(key in end for pair in ends for end in pair):
                    values = ([np.array([pair[i][key]]) for pair in ends] for i in (0, 1))
                    interval = paired_interval(*values)
                    # A single pair has no spread between seeds.
                    rows[name][key] = as_interval(interval, "+") if len(pairs) > 1 else f"{interval[0]:+.3f}"
    return pd.DataFrame.from_dict(rows, orient="index").fillna("")


def as_markdown(table: pd.DataFrame) -> str:
    """Write a table in Markdown, with its index as first column."""
    lines = ["| | " + " | ".join(map(in_cell, table.columns)) + " |", "|---" * (len(table.columns) + 1) + "|"]
    lines += [
        f"| {in_cell(name)} | " + " | ".join(map(in_cell, row)) + " |"
        for name, row in zip(table.index, table.values, strict=True)
    ]
    return "\n".join(lines)


def in_cell(value: object) -> str:
    """Write a value so that it neither ends its cell nor becomes a tag of HTML."""
    return escape(" ".join(str(value).split()), quote=False).replace("|", "\\|")


def at_steps(results: dict[str, list[Result]], steps: Sequence[int]) -> dict[str, dict[str, list[Result]]]:
    """Cut the runs after each step that they reached; returns by title the runs of each step, and those of the end."""
    found = {}
    for step in steps:
        reached = {name: [run.until(step) for run in runs if step in run.validations] for name, runs in results.items()}
        if any(reached.values()):
            found[f"After step {step:,}"] = {name: runs for name, runs in reached.items() if runs}
    title, ends = at_the_end(results)
    return {**found, title: ends}


def at_the_end(results: dict[str, list[Result]]) -> tuple[str, dict[str, list[Result]]]:
    """Return what the runs' ends are called, and the runs, cut after the last step that all have if they go on further.

    A run that trained longer is another run: the last of one is not compared with the last of the other.
    """
    runs = [run for of_name in results.values() for run in of_name]
    # A run that kept no samples of its validations has no figures of them to compare.
    if len({run.ends[0] for run in runs}) < 2 and len({run.ends[1] for run in runs if run.validations}) < 2:
        return WHOLE, results
    last = {name: sorted({run.ends[0] for run in of_name}) for name, of_name in results.items()}
    told = ", ".join(f"{name} at {' and '.join(f'{step:,}' for step in steps)}" for name, steps in last.items())
    shared = set.intersection(*(set(run.validations) or set(run.metrics) for run in runs)) - {0}
    if not shared:
        return f"After training, of different length: no step is common to all ({told})", results
    step = max(shared)
    cut = {name: [run.until(step) for run in of_name] for name, of_name in results.items()}
    return f"After step {step:,}, the last that all have (they ended: {told})", cut


def write_report(
    results: dict[str, list[Result]],
    baseline: str,
    commands: dict[str, str],
    out: Path,
    steps: Sequence[int] = (),
) -> list[Path]:
    """Write `report.md`, its pictures, and `report.html`, which holds everything and opens from disk.

    Args:
        results: runs by configuration, the baseline among them.
        commands: what was run, by configuration.
        out: folder for the files, made if missing.
        steps: steps at which the runs are compared, in addition to their end.

    Returns:
        paths of the files.
    """
    make_folder("--out", out)
    curves(results, out / "curves.png")
    outcomes(at_the_end(results)[1], out / "outcomes.png")
    tables = {
        when: (end_table(then), difference_table(then, baseline))
        for when, then in at_steps(results, steps).items()
        if baseline in then
    }
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    facts = {"title": out.name, "baseline": baseline, "commands": commands}
    as_text = {when: [as_markdown(table) for table in pair] for when, pair in tables.items()}
    markdown = templates.get_template("report.md.j2").render(**facts, tables=as_text, pictures=PICTURES)
    embedded = {
        title: "data:image/png;base64," + base64.b64encode((out / name).read_bytes()).decode()
        for name, title in PICTURES.items()
    }
    as_html = {when: [table.to_html(border=0) for table in pair] for when, pair in tables.items()}
    page = templates.get_template("report.html.j2").render(**facts, tables=as_html, pictures=embedded)
    (out / "report.md").write_text(markdown, encoding="utf-8")
    (out / "report.html").write_text(page, encoding="utf-8")
    return [out / "report.md", out / "report.html", *(out / name for name in PICTURES)]
