"""The reward in verl's form: `reward.custom_reward_function.path=pkg://examples.countdown.reward`."""

from typing import Any

from examples.countdown.task import Problem, is_solution


def compute_score(
    data_source: str, solution_str: str, ground_truth: dict[str, Any], extra_info: dict[str, Any] | None = None
) -> float:
    """1.0 if the response solves the problem, else 0.0.

    Args:
        data_source: the dataset's name; not used.
        solution_str: the decoded response, without special tokens.
        ground_truth: `{"numbers": [...], "target": int}` as stored in the dataset.
        extra_info: not used.
    """
    problem = Problem(tuple(int(number) for number in ground_truth["numbers"]), int(ground_truth["target"]))
    return float(is_solution(problem, solution_str))
