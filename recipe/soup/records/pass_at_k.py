"""Unbiased pass@k."""

from collections.abc import Sequence
from math import comb

PASS_AT = (1, 4, 8, 16)
"""The k that metrics and tables show."""


def powers_of_two(largest: int) -> list[int]:
    """1, 2, 4, ... up to `largest`: the k of a curve."""
    return [2**i for i in range(largest.bit_length())]


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that at least one of k samples, drawn without replacement from those taken, is correct.

    The unbiased estimator of Chen et al. 2021 (Codex); verl's `best@k` is a bootstrap.

    Args:
        samples: taken for the problem.
        correct: of them.
        k: at most `samples`.

    Raises:
        ValueError: k larger than the number of samples.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {correct} correct among {samples} samples is not defined")
    return 1.0 - comb(samples - correct, k) / comb(samples, k)


def mean_pass_at_k(counts: Sequence[tuple[int, int]], k: int) -> float:
    """Over problems.

    Args:
        counts: samples and correct samples of each problem.
    """
    return sum(pass_at_k(samples, correct, k) for samples, correct in counts) / len(counts)
