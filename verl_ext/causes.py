"""Find an error's own words: Ray wraps it, or verl and vLLM raise another, and it stands in lines of their log."""

import re
import traceback
from typing import Any

from ray.exceptions import RayActorError, RayTaskError

from verl_ext.health import ENDED

RAISED = re.compile(r"((?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt|Failure)\w*)(?:\(\w+\))?: (\S.*)")
"""A traceback's last line. Ray names the cause's class in brackets behind its own."""
_BEGINS = re.compile(
    r"Error in _run_prompt|EngineCore failed to start|EngineCore encountered|WorkerProc (?:failed|hit)"
)
"""With what verl's agent loops and vLLM's processes log an exception, whose traceback follows."""
_ORIGIN = re.compile(r"^(?:\(\S+ pid=\d+\) ?)?(?:\x1b\[[\d;]*m)*(?:[A-Z]+ \d\d-\d\d [\d:]+ \[[\w.]+:\d+\] ?)?")
"""What vLLM puts before each line."""
POINTS_ELSEWHERE = re.compile(r"no materializable trajectories|[Ss]ee (?:root cause|stack trace)|EngineCore|EngineDead")
"""Errors that are raised because of another one, which only stands in the log."""
_FRAME = re.compile(r'File "(.+)", line (\d+), in ')
_ADVICE = re.compile(r"The actor is dead because.* Some common causes include: .*")
KILLED = "Its process was killed (by the kernel, where memory is short: see dmesg), or crashed."
"""Instead of Ray's eight lines of advice for all kinds of death."""
RECORD_LINES = 400
LENGTH = 1000
"""Most characters of a cause."""


class LoggedCause:
    """Remembers the first error that agent loops or engines logged, and the sentence with which a run was ended.

    Attributes:
        ended: the sentence of `health`, or of whoever ended the run like it.
        raised: type and words of the first error.
    """

    def __init__(self) -> None:
        self.ended: str | None = None
        self.raised: str | None = None
        self._reading: Any = None
        self._left = 0

    def take(self, process: Any, lines: list[str]) -> None:
        """Take some lines of one process's log, in their order."""
        for line in lines:
            text = _ORIGIN.sub("", line)
            if ENDED in text and self.ended is None and not RAISED.match(text):
                self.ended = text.strip()
            if _BEGINS.search(text):
                if self._reading is None:
                    self._reading, self._left = process, RECORD_LINES
                elif self._reading == process:
                    self._left = 0  # the next one begins
            elif self._reading == process and self._left > 0:
                self._left -= 1
                if found := RAISED.match(text):  # of a chain of errors the last is what was raised
                    self.raised = f"{found[1]}: {found[2]}"


def own_words(error: BaseException) -> str:
    """Return type and message of an error in one line; if another Ray process raised it, those of its cause there."""
    place = _traceback(error)
    cause: Any = error
    while isinstance(cause, RayTaskError) and isinstance(cause.cause, BaseException):
        cause = cause.cause
    lines = [line for line in str(cause).splitlines() if line.strip()]
    if isinstance(cause, RayTaskError | RayActorError):
        if raised := [found for found in map(RAISED.match, lines) if found]:
            return _short(f"{raised[-1][1]}: {raised[-1][2]}")
        details = [line.strip() for line in lines if re.search(r"class_name: |exit detail: ", line)]
        return _short(_ADVICE.sub(KILLED, f"{type(cause).__name__}: {' '.join([*lines[:1], *details])}"))
    name = re.sub(r"^RayTaskError\((.+)\)$", r"\1", type(cause).__name__)
    if not lines:
        return _short(f"{name} {_where(place)}".strip())
    return _short(f"{name}: {' '.join(line.strip() for line in lines)}")


def cause_of(error: BaseException, logged: LoggedCause) -> str:
    """Return why a run failed, in one line."""
    words = own_words(error)
    # A watchdog knows better than the sentence that came first, of samples that a dead engine had lost.
    ended = words.partition(": ")[2] if words.endswith(ENDED) else logged.ended
    if ended is not None:
        # It knows only that something died.
        died, _, elsewhere = ended.partition("; its own error")
        return f"{logged.raised} ({died})" if elsewhere and logged.raised is not None else ended
    validates = "in _validate" in _traceback(error)  # which fails obscurely if all its samples are lost
    if logged.raised is not None and (POINTS_ELSEWHERE.search(words) or validates):
        return logged.raised
    return words


def _traceback(error: BaseException) -> str:
    # Ray's words are the traceback of the process that raised.
    return str(error) if isinstance(error, RayTaskError) else "".join(traceback.format_exception(error))


def _where(place: str) -> str:
    """Return the last line of code of a traceback, for errors without words."""
    lines = place.splitlines()
    frames = [(number, found) for number, found in enumerate(map(_FRAME.search, lines)) if found]
    if not frames:
        return ""
    number, frame = frames[-1]
    code = lines[number + 1].strip() if number + 1 < len(lines) else ""
    return f"in {frame[1]}, line {frame[2]}: {code}"


def _short(words: str) -> str:
    return words if len(words) <= LENGTH else f"{words[:LENGTH]}..."
