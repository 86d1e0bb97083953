"""Writes countdown's training and validation sets as parquet, in verl's columns. Deterministic by seed.

python -m examples.countdown.build_data --train 4096 --val 128
"""

import argparse
import random
from pathlib import Path

import pandas as pd

from examples.countdown.task import Problem, random_problem

HERE = Path(__file__).parent


def to_row(problem: Problem, index: int) -> dict:
    """One row with the columns that verl's RLHFDataset and its naive reward manager read."""
    return {
        "data_source": "countdown",
        "prompt": [{"role": "user", "content": problem.prompt}],
        "reward_model": {
            "style": "rule",
            "ground_truth": {"numbers": list(problem.numbers), "target": problem.target},
        },
        "extra_info": {"index": index},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=4096, help="number of training problems")
    parser.add_argument("--val", type=int, default=128, help="number of validation problems, none of them in training")
    parser.add_argument("--numbers", type=int, default=3, help="numbers in a problem (3 or 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "data", help="folder for train.parquet and val.parquet")
    args = parser.parse_args()

    rng = random.Random(args.seed)
    held_out: set[Problem] = set()
    while len(held_out) < args.val:
        held_out.add(random_problem(rng, args.numbers))
    validation = sorted(held_out, key=lambda problem: (problem.numbers, problem.target))
    training: list[Problem] = []
    while len(training) < args.train:
        problem = random_problem(rng, args.numbers)
        if problem not in held_out:
            training.append(problem)

    args.out.mkdir(parents=True, exist_ok=True)
    for name, problems in (("train", training), ("val", validation)):
        path = args.out / f"{name}.parquet"
        pd.DataFrame([to_row(problem, index) for index, problem in enumerate(problems)]).to_parquet(path)
        print(f"{len(problems)} problems in {path}")


if __name__ == "__main__":
    main()
