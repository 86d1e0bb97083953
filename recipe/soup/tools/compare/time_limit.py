"""`--minutes`: a study in pieces, for machines that are at hand for minutes at a time."""

import time
from collections.abc import Callable

from recipe.soup.errors import refuse

ENDING = 15.0
"""Seconds kept back for ending runs and writing the report."""


class TimeLimit:
    """Says whether there is time for one run more, and when time is up.

    How long a run takes is known from those of this call that came to their end: the longest counts. Before one has,
    runs are started; what is killed goes on at its last checkpoint when the study is run again.

    Args:
        minutes: of wall-clock time from now; None: as long as it takes.
        grace: seconds that a run may take to end when it is asked to.
        clock: seconds, always growing.

    Raises:
        SystemExit: no time at all, or none beside the grace.
    """

    def __init__(self, minutes: float | None, grace: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        if minutes is not None and not minutes > 0:
            raise refuse("--minutes", minutes, "leaves no time for a run; give a number above 0, or leave it out.")
        if minutes is not None and grace > 0 and minutes * 60 <= ENDING + grace:
            why = f"leaves no time for a run beside algorithm.soup.sigterm_grace={grace:g} seconds, which are kept back"
            raise refuse("--minutes", minutes, f"{why} for its end; give more minutes, or less grace.")
        self._clock, self._longest = clock, 0.0
        self._end = None if minutes is None else clock() + minutes * 60 - ENDING - grace
        self._began: dict[object, float] = {}

    @property
    def is_over(self) -> bool:
        """Whether the runs that are still running must be ended."""
        return self._end is not None and self._clock() >= self._end

    @property
    def allows_another(self) -> bool:
        """Whether a run that starts now is expected to end in time."""
        return self._end is None or self._clock() + self._longest < self._end

    def started(self, run: object) -> None:
        """Note that a run begins."""
        self._began[run] = self._clock()

    def ended(self, run: object) -> None:
        """Note that a run has come to its end."""
        self._longest = max(self._longest, self._clock() - self._began[run])
