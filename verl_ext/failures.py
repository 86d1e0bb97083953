"""Why verl's agent loops lost samples: they log the error in their own process, drop the sample, and go on."""

import logging
from typing import Any

import ray
from ray.exceptions import RayError

AGENT_LOOPS = "verl.trainer.ppo.v1.agent_loop_tq"
"""The logger that verl tells failed samples to."""
ANSWER_SECONDS = 10.0
LENGTH = 300
"""Characters of an error that fit into a sentence."""


def in_a_line(error: BaseException) -> str:
    """Type and first words of an error; of one that another Ray process raised, those of its cause there."""
    cause = getattr(error, "cause", None) or error
    words = str(cause).strip().splitlines() or [""]
    return f"{type(cause).__name__}: {words[0]}"[:LENGTH].rstrip(": .")


class FirstFailure(logging.Handler):
    """Remembers the first error that was logged with its exception since it was last asked.

    Attributes:
        held: when it was logged, in seconds since the epoch, and its line.
    """

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.held: tuple[float, str] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if self.held is None and error is not None:
            self.held = (record.created, in_a_line(error))


_first = FirstFailure()


def remember_failures() -> None:
    """From here on, in a process of agent loops."""
    logging.getLogger(AGENT_LOOPS).addHandler(_first)


def _take(_: Any) -> tuple[float, str] | None:
    held, _first.held = _first.held, None
    return held


def first_failure(agents: list[Any]) -> str | None:
    """The first error of any agent-loop worker since the last call, in a line; None if none was logged.

    Args:
        agents: verl's agent-loop workers (Ray actors), in which `remember_failures` was called.
    """
    try:
        held = ray.get([agent.__ray_call__.remote(_take) for agent in agents], timeout=ANSWER_SECONDS)
    except RayError as error:
        return f"{in_a_line(error)} (an agent-loop worker that was asked)"
    return min((failure for failure in held if failure is not None), default=(0.0, None))[1]
