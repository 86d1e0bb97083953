"""The problems of training in an order, as verl's dataloader hands out its rows."""

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from recipe.soup.records.problems import Problem


class TrainingProblems:
    """Epoch after epoch, each in another order, without an end.

    Args:
        problems: of an epoch.
        seed: what the orders are drawn with.
        chunk: how many are handed out at a time.

    Attributes:
        drawn: how many have been handed out.
    """

    def __init__(self, problems: Sequence[Problem], seed: int, chunk: int) -> None:
        self._order, self._chunk, self.drawn = _endless(problems, seed), chunk, 0

    def fetch(self) -> tuple[list[Problem], list[Any], int]:
        """Hand out the next ones; returns them, their chat messages, and how many had been handed out before."""
        before, problems = self.drawn, list(islice(self._order, self._chunk))
        self.drawn += len(problems)
        return problems, [problem.messages for problem in problems], before

    def skip(self, count: int) -> None:
        """Leave out the first ones, which a run has been trained on before it was resumed."""
        self.drawn += sum(1 for _ in islice(self._order, count))


def _endless(problems: Sequence[Problem], seed: int) -> Iterator[Problem]:
    rng = random.Random(seed)
    while True:
        yield from rng.sample(problems, len(problems))
