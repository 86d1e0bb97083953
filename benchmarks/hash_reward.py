"""A reward for models that solve nothing: `reward.custom_reward_function.path=pkg://benchmarks.hash_reward`.

Random weights never solve a task; with equal rewards every advantage is 0, nothing is learned, and a run's versions
are one and the same.
"""

import zlib
from typing import Any


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any] | None = None
) -> float:
    """In [0, 1), by a hash of the decoded response: the same for the same text, and else as good as random."""
    return zlib.crc32(solution_str.encode()) / 2**32
