"""Find out why verl's agent loops lost samples: they log the error in their own process, drop the sample, and go on."""

import logging
from typing import Any

import ray
from ray.exceptions import RayError

AGENT_LOOPS = "verl.trainer.ppo.v1.agent_loop_tq"
"""The logger on which verl reports failed samples."""
ANSWER_SECONDS = 10.0
LENGTH = 300
"""Most characters of an error in a sentence."""


def in_a_line(error: BaseException) -> str:
    """Return type and first words of an error; if another Ray process raised it, those of its cause there."""
    cause = getattr(error, "cause", None) or error
    words = str(cause).strip().splitlines() or [""]
    return f"{type(cause).__name__}: {words[0]}"[:LENGTH].rstrip(": .")


class FirstFailure(logging.Handler):
    """Remembers the first error that was logged with its exception since it was last asked.

    Attributes:
        held: when the error was logged, in seconds since the epoch, and the error in a line.
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
    """Remember failures from here on; call it in each process of agent loops."""
    logging.getLogger(AGENT_LOOPS).addHandler(_first)


def _take(_: Any) -> tuple[float, str] | None:
    held, _first.held = _first.held, None
    return held


def first_failure(agents: list[Any]) -> str | None:
    """Return the first error of any agent-loop worker since the last call, in a line; None if none was logged.

    Args:
        agents: verl's agent-loop workers (Ray actors), in which `remember_failures` was called.
    """
    try:
        held = ray.get([agent.__ray_call__.remote(_take) for agent in agents], timeout=ANSWER_SECONDS)
    except RayError as error:
        return f"{in_a_line(error)} (an agent-loop worker that was asked)"
    return min((failure for failure in held if failure is not None), default=(0.0, None))[1]
