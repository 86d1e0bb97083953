"""A run's metrics as a Markdown table: their means over so many steps a row.

Example:
    python -m benchmarks.windows runs/gpu/learn_soup.jsonl --every 10 reward=critic/score/mean
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from recipe.soup.records.metrics_file import read_metrics


def table(metrics: dict[int, dict[str, float]], every: int, columns: Mapping[str, str]) -> str:
    """One row for the validation before training, if there was one, and one for each `every` steps.

    Args:
        metrics: by step; 0 is before training.
        columns: heading and key of each; a cell is empty where no step has the key.
    """
    windows: dict[int, list[dict[str, float]]] = {}
    for step in sorted(metrics):
        windows.setdefault(-(-step // every), []).append(metrics[step])
    lines = [f"| steps | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for window, rows in windows.items():
        steps = f"{(window - 1) * every + 1} to {(window - 1) * every + len(rows)}" if window else "0"
        found = [[row[key] for row in rows if key in row] for key in columns.values()]
        lines.append(f"| {steps} | {' | '.join(f'{fmean(values):.4g}' if values else '' for values in found)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", type=Path, help="what verl's file logger wrote")
    parser.add_argument("--every", type=int, default=10, help="steps in a row")
    parser.add_argument("columns", nargs="+", metavar="heading=key")
    args = parser.parse_args()
    if not args.metrics.exists():
        raise SystemExit(f"{args.metrics}: no such file; give what verl's file logger wrote.")
    columns = dict(column.split("=", 1) for column in args.columns)
    metrics = read_metrics(args.metrics)
    print(table(metrics, args.every, columns))
    known = {key for values in metrics.values() for key in values}
    if missing := [key for key in columns.values() if key not in known]:
        # Behind the table: what there is, took a GPU to get.
        raise SystemExit(f"{', '.join(missing)}: no step has it; give keys that the run logged.")


if __name__ == "__main__":
    main()
