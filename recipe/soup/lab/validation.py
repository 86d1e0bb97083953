"""What a validation in the lab tells, under the names of verl's and ours on the real path."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from recipe.soup.records.pass_at_k import pass_metrics
from recipe.soup.records.problems import Problem, correctness

Graded = dict[str, Any]
"""`score`, and what else a reward told of a response."""


def accuracy_metrics(problems: Sequence[Problem], graded: Sequence[Graded], n: int) -> dict[str, float]:
    """Mean accuracy and unbiased pass@k for each data source.

    Args:
        problems: of a validation.
        graded: `n` responses to each problem, one problem after the other.
    """
    values: dict[str, list[float]] = defaultdict(list)
    scores, expected = [], {}
    for number, problem in enumerate(problems):
        group = (problem.data_source, str(number))
        expected[group] = n
        for answer in graded[number * n : (number + 1) * n]:
            values[problem.data_source].append(correctness(answer))
            scores.append((group, correctness(answer)))
    told = "acc" if any("acc" in answer for answer in graded) else "reward"
    means = {f"val-core/{source}/{told}/mean@{n}": float(np.mean(found)) for source, found in values.items()}
    return means | pass_metrics(scores, expected)
