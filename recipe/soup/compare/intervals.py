"""Bootstrap intervals over problems and seeds. Imports no verl."""

from collections.abc import Sequence

import numpy as np

DRAWS = 2000
LEVEL = (0.025, 0.975)


def mean_interval(values: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Mean over runs of their mean over problems, with a 95 % interval.

    Draws runs, and within each its problems, with replacement: the interval is about other seeds and other problems.

    Args:
        values: for each run, one number a problem.
    """
    rng = np.random.default_rng(0)
    means = [
        np.mean([rng.choice(values[i], len(values[i])).mean() for i in rng.integers(len(values), size=len(values))])
        for _ in range(DRAWS)
    ]
    low, high = np.quantile(means, LEVEL)
    return float(np.mean([value.mean() for value in values])), float(low), float(high)


def paired_interval(values: Sequence[np.ndarray], twins: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Mean difference to the twins of the same seeds on the same problems, with a 95 % interval.

    Args:
        values, twins: for each seed, one number a problem, in the same order.
    """
    return mean_interval([value - twin for value, twin in zip(values, twins, strict=True)])
