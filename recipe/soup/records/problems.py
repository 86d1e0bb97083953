"""What a row of a dataset in verl's columns asks, and whether a graded response is right."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One row.

    Attributes:
        messages: of the chat that ends with the question.
        row: all columns; verl hands them to a reward.
    """

    messages: list[dict[str, str]]
    row: dict[str, Any]

    @property
    def data_source(self) -> str:
        return self.row["data_source"]

    @property
    def ground_truth(self) -> Any:
        return self.row["reward_model"]["ground_truth"]


def correctness(graded: Mapping[str, Any]) -> float:
    """Return `acc` where a reward tells it, else its `score`; above 0 is right."""
    told = graded.get("acc")
    return float(graded["score"] if told is None else told)
