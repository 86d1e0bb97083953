"""A Hydra callback: verl's walls of log go to a file, and the terminal shows where the run is.

    hydra.callbacks.console: {_target_: verl_ext.console.QuietConsole, log: runs/log.txt}

`log=null` leaves the terminal to verl.
"""

import atexit
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from verl_ext.health import ENDED
from verl_ext.run_progress import RunProgress

POLL_SECONDS = 0.2
TAIL = 15
"""Lines of the log that are shown when a run ends where nobody could catch it."""
LINES = 10
"""Lines about steps where there is no terminal, in a whole run."""
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_ORIGIN = re.compile(r"^\([^()]* pid=\d+[^()]*\) ")


def _seconds(since: float) -> str:
    return f"{time.monotonic() - since:.0f} s"


class Display:
    """Shows a `RunProgress`: a bar in a terminal, a line now and then elsewhere.

    Args:
        out: where to; the terminal, or what it was redirected to.
    """

    def __init__(self, out: TextIO) -> None:
        self.console = Console(file=out, highlight=False)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._bar = Progress(
            *columns, TextColumn("{task.fields[note]}"), TimeRemainingColumn(), console=self.console, transient=True
        )
        self._task = self._bar.add_task("", total=None, note="")
        self._state = RunProgress()
        self._began = self._phase_began = time.monotonic()
        self._told = 0

    def start(self) -> None:
        """Begin with the first phase."""
        if self.console.is_terminal:
            self._bar.start()
        self._announce()

    def _announce(self) -> None:
        if self.console.is_terminal:
            self._bar.update(self._task, description=self._state.doing)
        else:
            self._print(self._state.doing)

    def _print(self, text: str) -> None:
        self.console.print(f"{_seconds(self._began):>6}  {text}", soft_wrap=True)

    def feed(self, line: str) -> None:
        """Take a line of the log, and show what it tells."""
        phase, state = self._state.phase, self._state
        doing, began = state.doing, self._phase_began
        if ENDED in line:
            self.console.print(line, style="red", soft_wrap=True)
        if not state.feed(line):
            return
        if state.phase != phase:
            self._phase_began = time.monotonic()
            if self.console.is_terminal:
                self.console.print(f"  {doing} ({_seconds(began)})", style="dim", soft_wrap=True)
            self._announce()
        if state.total:
            note = ", ".join(f"{name} {value:.3g}" for name, value in state.shown.items())
            self._bar.update(self._task, completed=state.step, total=state.total, note=note)
            decile = state.step * LINES // state.total
            if not self.console.is_terminal and note and decile > self._told:
                self._told = decile
                self._print(f"step {state.step}/{state.total}: {note}")

    def stop(self) -> None:
        """Leave the terminal as it was."""
        if self.console.is_terminal:
            self._bar.stop()


class QuietConsole(Callback):
    """Sends what the driver and Ray print to a file while the job runs, and shows progress instead.

    Args:
        log: the file; None: nothing happens.
        expect: a sentence on how long it takes.
    """

    def __init__(self, log: str | None, expect: str = "") -> None:
        self._path = Path(os.path.normpath(log)) if log else None
        self._expect = expect
        self._ended = threading.Event()

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._streams = [os.dup(1), os.dup(2)]
        # Subprocesses of the driver inherit a file's descriptor without harm; a pipe's would block them.
        target = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        self._flush()
        for stream in (1, 2):
            os.dup2(target, stream)
        os.close(target)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):
                stream.reconfigure(line_buffering=True)
        self._terminal = os.fdopen(os.dup(self._streams[0]), "w", buffering=1)
        self._display = Display(self._terminal)
        self._display.console.print(
            f"verl's log: {self._path} (hydra.callbacks.console.log=null shows it here). {self._expect}", soft_wrap=True
        )
        self._display.start()
        self._thread = threading.Thread(target=self._follow, name="quiet-console", daemon=True)
        self._thread.start()
        atexit.register(self._uncaught)

    @staticmethod
    def _flush() -> None:
        sys.stdout.flush()
        sys.stderr.flush()

    def _lines(self) -> Iterator[str]:
        """Of the log, as they come; progress bars end theirs with a carriage return."""
        assert self._path is not None
        with self._path.open(errors="replace", newline="") as log:
            rest = ""
            while True:
                last = self._ended.is_set()
                *lines, rest = re.split(r"[\r\n]+", rest + log.read())
                yield from lines
                if last:
                    return
                self._ended.wait(POLL_SECONDS)

    def _follow(self) -> None:
        for line in self._lines():
            self._display.feed(_ORIGIN.sub("", _ESCAPES.sub("", line)))

    def _restore(self) -> None:
        self._flush()
        self._ended.set()
        self._thread.join()
        self._display.stop()
        for stream, saved in zip((1, 2), self._streams, strict=True):
            os.dup2(saved, stream)
            os.close(saved)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if self._path is None or self._ended.is_set():
            return
        self._restore()
        if job_return.status is JobStatus.FAILED:
            print(f"The run failed; what led to it is in {self._path}.", file=sys.stderr)

    def _uncaught(self) -> None:
        """An interrupt or an exit from within: its words are in the log."""
        if not self._ended.is_set():
            self._restore()
            tail = [line for line in (self._path or Path()).read_text(errors="replace").splitlines() if line.strip()]
            print("\n".join([f"The run ended early; the last lines of {self._path}:", *tail[-TAIL:]]), file=sys.stderr)
