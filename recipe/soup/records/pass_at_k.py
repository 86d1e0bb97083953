"""Estimate pass@k without bias."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import comb

Group = tuple[str, str]
"""A prompt's data source and uid."""
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


def pass_metrics(scores: Iterable[tuple[Group, float]], expected: dict[Group, int]) -> dict[str, float]:
    """`soup/val/<data source>/pass@k` over prompts, for each k of `PASS_AT` that all of them have samples for.

    Args:
        scores: of each sample; above 0 is correct. (verl's `best@k` is a bootstrap of the mean of the best score.)
        expected: samples of each prompt; those that failed to arrive count as wrong.
    """
    correct: dict[Group, int] = dict.fromkeys(expected, 0)
    for group, score in scores:
        correct[group] += score > 0
    counts: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for group, hits in correct.items():
        counts[group[0]].append((expected[group], hits))
    return {
        f"soup/val/{source}/pass@{k}": mean_pass_at_k(prompts, k)
        for source, prompts in counts.items()
        for k in PASS_AT
        if k <= min(samples for samples, _ in prompts)
    }
