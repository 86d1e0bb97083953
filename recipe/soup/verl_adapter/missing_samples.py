"""Samples that were asked for and never came: counted in each step, told once, and above a share the run's end.

Both drivers count here. verl drops a sample whose generation or reward failed, and so does the lab; what is trained on
is then chosen by what can be sampled and graded.
"""

from collections.abc import Callable

from verl_ext.health import NOTICE, end_run

KEY = "algorithm.soup.max_lost_share"


class MissingSamples:
    """Counts the samples of one step after the other.

    Args:
        per_step: samples that a step is to have.
        most: the largest share that a step may lose.
        first_error: what the first loss since the last question was due to, in a line; None if nobody knows.
    """

    def __init__(self, per_step: int, most: float, first_error: Callable[[], str | None]) -> None:
        self._per_step, self._most, self._ask = per_step, most, first_error
        self._asked = self._arrived = 0
        self._error: str | None = None
        self._told = False

    def add(self, step: int, asked: int, arrived: int) -> None:
        """Some samples of a step are settled: no more of them will come.

        Raises:
            RunEndedError: the step has lost too much.
        """
        self._asked += asked
        self._arrived += arrived
        lost, of = self._asked - self._arrived, max(self._asked, self._per_step)
        if lost > self._most * of:
            end_run(
                f"Step {step} lost {lost} of {of} samples, more than {KEY}={self._most:g} allows: the rest would be "
                f"chosen by what can be sampled and graded. The first error was {self._first_error()}. Mend it, or "
                f"raise {KEY} (1: never end a run for a part of its samples)."
            )
        if not self._arrived and self._asked >= self._per_step:  # verl's asynchronous trainer would refill for ever
            self.none_left(f"Step {step}")

    def none_left(self, what: str) -> None:
        """End the run whose step, or validation, has lost every sample; no share allows that.

        Raises:
            RunEndedError: always.
        """
        end_run(f"{what} lost all of its samples. The first error was {self._first_error()}. Mend it.")

    def metrics(self, step: int, trained: int) -> dict[str, float]:
        """Of the step, whose samples are all settled.

        Args:
            trained: samples in its batch.
        """
        asked, arrived = self._asked, self._arrived
        self._asked = self._arrived = 0
        counts = self._counts("soup/train/samples", asked, arrived, f"step {step}")
        return counts | {"soup/train/samples/trained": float(trained)}

    def validated(self, step: int, asked: int, arrived: int) -> dict[str, float]:
        """Of a validation after `step` updates, in which samples that never came count as wrong."""
        return self._counts("soup/val/samples", asked, arrived, f"the validation after step {step}")

    def _counts(self, name: str, asked: int, arrived: int, where: str) -> dict[str, float]:
        if arrived < asked and not self._told:
            self._told = True
            print(
                f"{NOTICE}{where} lost {asked - arrived} of {asked} samples; the first error was "
                f"{self._first_error()}. Losses are counted in soup/train/samples/lost_share and "
                "soup/val/samples/lost_share; in validation they count as wrong, and a step of training that loses "
                f"more than {KEY}={self._most:g} ends the run.",
                flush=True,
            )
        return {
            f"{name}/asked": float(asked),
            f"{name}/arrived": float(arrived),
            f"{name}/lost_share": (asked - arrived) / asked if asked else 0.0,
        }

    def _first_error(self) -> str:
        self._error = self._ask() or self._error
        return self._error or "not logged"
