"""Writes countdown's training and validation sets as parquet, in verl's columns. Deterministic by seed.

python -m examples.countdown.build_data --train 4096 --val 128
"""

import argparse
import random
from pathlib import Path

import pandas as pd

from examples.countdown.task import Problem, random_problem, solutions

HERE = Path(__file__).parent


def to_row(problem: Problem, index: int, demonstrations: list[str]) -> dict:
    """One row with the columns that verl's RLHFDataset and its naive reward manager read.

    Args:
        demonstrations: correct responses, for a column `target` as LUFFY's data has it; none: no such column.
    """
    target = [{"role": "assistant", "content": text} for text in demonstrations]
    return {
        **({"target": target} if target else {}),
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
    parser.add_argument("--demonstrations", type=int, default=0, help="solutions of each training problem, at most")
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

    # From a stream of its own, so that the problems are the same with and without.
    shown = random.Random(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, problems in (("train", training), ("val", validation)):
        path = args.out / f"{name}.parquet"
        count = args.demonstrations if name == "train" else 0
        rows = []
        for index, problem in enumerate(problems):
            known = solutions(problem) if count else []
            rows.append(to_row(problem, index, shown.sample(known, min(count, len(known)))))
        pd.DataFrame(rows).to_parquet(path)
        print(f"{len(problems)} problems in {path}")


if __name__ == "__main__":
    main()
