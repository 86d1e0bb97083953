"""Writes datasets for training and evaluation as parquet in verl's columns, from the Hugging Face hub or a file."""

import argparse
from pathlib import Path

import pandas as pd

from recipe.soup.errors import refuse
from recipe.soup.mathematics.datasets import DATASETS, Row, check_name, load_counted

EXAMPLES = "\n".join(
    [
        "examples:",
        "  python -m examples.data.prepare dapo_math_17k math500 --out data",
        "  python -m examples.data.prepare gsm8k --from downloads/test-00000-of-00001.parquet --limit 100",
        "",
        "datasets:",
        *(f"  {name:<15}{dataset.repository}, {dataset.split}" for name, dataset in DATASETS.items()),
    ]
)


def prepare(name: str, out: Path, source: Path | None = None, limit: int | None = None) -> Path:
    """Write `<out>/<name>.parquet`, and say what is in it.

    Args:
        name: one of `benchmarks.DATASETS`.
        out: folder; made if it is not there.
        source: as in `benchmarks.load`.
        limit: at most so many problems, the first ones; None: all.

    Raises:
        SystemExit: as `benchmarks.load`.
    """
    loaded = load_counted(name, source)
    rows = loaded.rows[:limit]
    path = out / f"{name}.parquet"
    out.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_parquet(path)
    print(f"{name}: {len(rows):,} problems in {path}")
    if len(rows) < len(loaded.rows):
        print(f"  {len(loaded.rows) - len(rows):,} more left out (--limit {limit})")
    if loaded.repetitions:
        print(f"  {loaded.repetitions:,} rows left out because their problem was there before")
    if loaded.contradictions:
        print(f"  {loaded.contradictions:,} of them with another answer than the one that is kept")
    print(example(rows[0]))
    return path


def example(row: Row) -> str:
    """A row for people to look at."""
    problem = "\n    ".join(row["prompt"][0]["content"].splitlines())
    return f"  the first one:\n    {problem}\n  its answer: {row['reward_model']['ground_truth']}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.data.prepare",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="which datasets; see below")
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder for <NAME>.parquet (default: data)")
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="FILE",
        help="with one NAME: read this file of the hub's columns (parquet, json, jsonl, csv), or this folder of "
        "parquet files, instead of the hub",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="at most N problems of each (default: all)")
    args = parser.parse_args()
    if args.source and len(args.names) > 1:
        raise refuse(
            "--from", args.source, f"is one dataset's file, and {len(args.names)} were named: run it for each."
        )
    if args.limit is not None and args.limit < 1:
        raise refuse("--limit", args.limit, "must be at least 1.")
    for name in args.names:
        check_name(name)
    for name in args.names:
        prepare(name, args.out, args.source, args.limit)


if __name__ == "__main__":
    main()
