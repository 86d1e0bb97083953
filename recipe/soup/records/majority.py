"""Estimate maj@k: is the most frequent answer of k samples right?"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

DRAWS = 200


def majority_at_k(answers: Sequence[str], correct: Sequence[bool], k: int, rng: np.random.Generator) -> float:
    """Return the share of random choices of k samples in which the most frequent answer is correct.

    Tied answers share the win equally. A sample without an answer ("") has no vote; if none of the k has an answer,
    they are wrong. (Our choice: verl's `maj@N` draws with replacement, so that a third of the samples is left out even
    at k = n.)

    Args:
        answers: answers of the n samples of one problem, comparable as text.
        correct: whether each sample is correct.
        k: number of samples to choose, from 1 to n.
    """
    right = {answer for answer, is_correct in zip(answers, correct, strict=True) if is_correct}
    total, draws = 0.0, 1 if k == len(answers) else DRAWS
    for _ in range(draws):
        chosen = rng.choice(len(answers), size=k, replace=False)
        votes = Counter(answers[i] for i in chosen if answers[i])
        winners = [answer for answer, count in votes.items() if count == max(votes.values())]
        total += sum(answer in right for answer in winners) / max(len(winners), 1)
    return total / draws
