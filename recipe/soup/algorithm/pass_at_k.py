"""The advantage of pass@k training, a rival of mixing: a group of k counts as solved where one of its samples is."""

from collections import Counter
from collections.abc import Hashable, Sequence
from math import comb, sqrt

import torch


def pass_at_k_advantages(rewards: torch.Tensor, groups: Sequence[Hashable], k: int) -> torch.Tensor:
    """Advantages whose expected update raises pass@k, over all choices of k samples of a prompt (arXiv 2508.10751).

    With R the share of choices that hold a solved sample (reward above 0) and s = sqrt(R (1 - R)): (1 - R) / s for a
    solved sample; for any other (1 - R - q) / s, where q is the share of solved-free choices among those that hold it.

    Args:
        rewards: (samples,).
        groups: the prompt of each.
        k: at least 1; a prompt that lost samples has no choice of more than it has.

    Returns:
        (samples,); 0 where every choice is solved, or none.
    """
    solved = [reward > 0 for reward in rewards.tolist()]
    sizes = Counter(groups)
    failed = Counter(group for group, is_solved in zip(groups, solved, strict=True) if not is_solved)
    advantages = torch.zeros_like(rewards)
    for row, (group, is_solved) in enumerate(zip(groups, solved, strict=True)):
        samples, failures = sizes[group], failed[group]
        draws = min(k, samples)
        none_solved = comb(failures, draws) / comb(samples, draws)
        if not 0 < none_solved < 1:
            continue
        alone = 0.0 if is_solved else comb(failures - 1, draws - 1) / comb(samples - 1, draws - 1)
        advantages[row] = (none_solved - alone) / sqrt(none_solved * (1 - none_solved))
    return advantages
