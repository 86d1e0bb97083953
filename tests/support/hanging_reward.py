"""A reward function that never answers for one response in a few, as one that waits for a server may do."""

import time


def compute_score(data_source: str, solution_str: str, ground_truth: object, extra_info: object = None) -> float:
    if len(solution_str) % 5 == 0:
        time.sleep(3600)
    return 0.0
