"""Estimate pass@k without bias."""

from collections.abc import Sequence
from math import comb

PASS_AT = (1, 4, 8, 16)
"""Values of k in metrics and tables."""


def powers_of_two(largest: int) -> list[int]:
    """Return 1, 2, 4, ... up to `largest`, the values of k in a curve."""
    return [2**i for i in range(largest.bit_length())]


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Return the probability that at least one of k samples, drawn without replacement, is correct.

    This is the unbiased estimator of Chen et al. 2021 (Codex); verl's `best@k` is a bootstrap.

    Args:
        samples: number of samples of the problem.
        correct: how many of them are correct.
        k: number of samples to draw, at most `samples`.

    Raises:
        ValueError: k is larger than the number of samples.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {correct} correct among {samples} samples is not defined")
    return 1.0 - comb(samples - correct, k) / comb(samples, k)


def mean_pass_at_k(counts: Sequence[tuple[int, int]], k: int) -> float:
    """Average pass@k over problems.

    Args:
        counts: number of samples and of correct samples of each problem.
    """
    return sum(pass_at_k(samples, correct, k) for samples, correct in counts) / len(counts)
