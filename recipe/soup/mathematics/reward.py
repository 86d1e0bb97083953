"""The reward for mathematics, in verl's form: `reward.custom_reward_function.path=pkg://recipe.soup.mathematics.reward`.

math-verify grades, in a process of its own (`grading.py` says why). Each process that asks has one; verl has
`reward.num_workers` processes that ask.
"""

import atexit
import json
import math
import os
import subprocess
import sys
import threading
from typing import Any

from recipe.soup.mathematics.boxed import last_box

TAIL = 300
"""Characters at the end of a response without a box in which its answer is looked for."""
LONGEST_PRED = 200
"""Most characters of `pred`; verl keeps these texts in arrays as wide as the longest."""


class Grader:
    """Asks a process that grades. Threads may share it, and then wait for one another."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def ask(self, **request: Any) -> Any:
        """Return the reply of `grading.serve`; None if the request took too much time or memory.

        Raises:
            RuntimeError: the process cannot be started, e.g. because math-verify is not installed.
        """
        with self._lock:
            process = self._process
            if process is None or process.poll() is not None:
                process = self._process = self._start()
            assert process.stdin
            assert process.stdout
            try:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                line = ""
            except BaseException:  # an interrupt must not leave a reply to the next request
                self._end()
                raise
            if not line.endswith("\n"):
                self._end()
                return None
            return json.loads(line)

    def close(self) -> None:
        """End the process; the next request starts another."""
        with self._lock:
            self._end()

    def _start(self) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "recipe.soup.mathematics.grading"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
        assert process.stdout
        if not process.stdout.readline():
            raise RuntimeError(
                f"`{' '.join(command)}` ended at once, with exit code {process.wait()}; what it printed above says why "
                "(without math-verify: pip install math-verify)."
            )
        return process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


_grader = Grader()
atexit.register(lambda: _grader.close())


def _forget() -> None:
    """Begin anew in a forked process: threads that may hold the lock are not there, and the pipe is its parent's."""
    global _grader
    _grader = Grader()


os.register_at_fork(after_in_child=_forget)


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any] | None = None
) -> dict[str, Any]:
    r"""Give 1.0 if the response's answer has the value of the true one, else 0.0.

    The answer is the content of the last `\boxed{}` (`boxed.last_box`); if there is no box, what math-verify finds in
    the last `TAIL` characters. Only what comes after the last `</think>` counts, if there is one.

    Args:
        data_source: the dataset's name; not used.
        solution_str: the decoded response, without special tokens.
        ground_truth: the true answer, LaTeX or plain; without one (None, NaN) nothing is right.
        extra_info: not used.

    Returns:
        `score` and `acc`: 1.0 or 0.0; verl calls the latter accuracy.
        `pred`: a text that answers of equal value share, if possible; verl counts majorities of it (`maj@N`). It is ""
        for a response without an answer: verl counts that as an answer, but drops `maj@N` where one is None.

    Raises:
        RuntimeError: math-verify cannot be started; never because of what the response contains.
    """
    # Half a character of UTF-16, which a tokenizer may leave behind, cannot be written to a dump.
    response = str(solution_str).encode(errors="replace").decode().rpartition("</think>")[2]
    answer, free = last_box(response), False
    if answer is None:
        answer, free = _tail(response), True
    if not answer or _is_missing(ground_truth):
        return {"score": 0.0, "acc": 0.0, "pred": ""}
    equal = _grader.ask(answer=answer, free=free, truth=str(ground_truth))
    pred = None if equal is None else _grader.ask(answer=answer, free=free)
    if pred is None:
        pred = "" if free else "".join(answer.split())
    score = float(equal is True)
    return {"score": score, "acc": score, "pred": pred[:LONGEST_PRED]}


def _is_missing(ground_truth: Any) -> bool:
    r"""Whether a row has no true answer: as text it would be one, which `\boxed{None}` or `\boxed{nan}` equals."""
    return ground_truth is None or (isinstance(ground_truth, float) and math.isnan(ground_truth))


def _tail(response: str) -> str:
    """Return the end of the response, beginning with a whole word."""
    response = response.strip()
    return response if len(response) <= TAIL else response[-TAIL:].partition(" ")[2]
