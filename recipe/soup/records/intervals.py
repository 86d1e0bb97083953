"""Compute bootstrap intervals over problems and seeds."""

from collections.abc import Sequence

import numpy as np

DRAWS = 2000
LEVEL = (0.025, 0.975)


def mean_interval(values: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Return the mean over runs and problems, with its 95 % interval.

    Runs and problems are drawn with replacement: the interval is about other seeds and other problems. All runs meet
    the same problems, so they share each draw of problems; if each run had its own, their difficulty would average out.

    Args:
        values: for each run an array with one number for each problem, in the same order.
    """
    rng, table = np.random.default_rng(0), np.stack(values)
    runs, problems = table.shape
    means = [
        table[np.ix_(rng.integers(runs, size=runs), rng.integers(problems, size=problems))].mean() for _ in range(DRAWS)
    ]
    low, high = np.quantile(means, LEVEL)
    return float(table.mean()), float(low), float(high)


def paired_interval(values: Sequence[np.ndarray], twins: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Return the mean difference to the twins with the same seeds on the same problems, with its 95 % interval.

    Args:
        values, twins: for each seed an array with one number for each problem, in the same order.
    """
    return mean_interval([value - twin for value, twin in zip(values, twins, strict=True)])
