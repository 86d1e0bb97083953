"""Writes the arithmetic task's training and validation sets as parquet, in verl's columns. Deterministic by seed.

python -m examples.smollm2.build_data                # runs/smollm2/data/train.parquet and val.parquet
"""

import argparse
import random
from pathlib import Path

import pandas as pd

from examples.smollm2.task import Problem, random_problem


def to_row(problem: Problem, index: int) -> dict:
    """One row with the columns that verl's RLHFDataset and its naive reward manager read."""
    return {
        "data_source": "arithmetic",
        "prompt": [{"role": "user", "content": problem.prompt}],
        "reward_model": {"style": "rule", "ground_truth": problem.answer},
        "extra_info": {"index": index},
    }


def build(out: Path, train: int, val: int, seed: int) -> None:
    """Write `train` and `val` problems, all different, to `out`."""
    rng = random.Random(seed)
    different: dict[Problem, None] = {}
    while len(different) < train + val:
        different[random_problem(rng)] = None
    problems = list(different)
    out.mkdir(parents=True, exist_ok=True)
    for name, part in (("val", problems[:val]), ("train", problems[val:])):
        path = out / f"{name}.parquet"
        pd.DataFrame([to_row(problem, index) for index, problem in enumerate(part)]).to_parquet(path)
        print(f"{len(part)} problems in {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=4096, help="number of training problems")
    parser.add_argument("--val", type=int, default=128, help="number of validation problems, none of them in training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2/data"), help="folder")
    args = parser.parse_args()
    build(args.out, args.train, args.val, args.seed)


if __name__ == "__main__":
    main()
