"""A grader that any text can satisfy: for responses that go on behind their end."""

from typing import Any


def compute_score(data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None, **_: Any) -> float:
    return float(solution_str.count("1") % 2)
