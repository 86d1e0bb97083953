"""Countdown's reward, except that it fails for one response in forty: verl then trains on incomplete groups."""

import zlib
from typing import Any

from examples.countdown.reward import compute_score as countdown_score


def compute_score(data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None) -> float:
    if zlib.crc32(solution_str.encode()) % 40 == 0:
        raise ValueError("a grader that fails now and then")
    return countdown_score(data_source, solution_str, ground_truth, extra_info)
