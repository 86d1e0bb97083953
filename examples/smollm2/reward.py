"""The reward in verl's form: `reward.custom_reward_function.path=pkg://examples.smollm2.reward`."""

from typing import Any

from examples.smollm2.task import is_right


def compute_score(
    data_source: str, solution_str: str, ground_truth: int, extra_info: dict[str, Any] | None = None
) -> float:
    """1.0 if the response's last number is the answer, else 0.0.

    Args:
        data_source: the dataset's name; not used.
        solution_str: the decoded response, without special tokens.
        ground_truth: the answer, as stored in the dataset.
        extra_info: not used.
    """
    return float(is_right(int(ground_truth), solution_str))
