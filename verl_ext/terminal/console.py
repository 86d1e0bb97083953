"""A Hydra callback that sends verl's long log to a file, and shows in the terminal where the run is.

    hydra.callbacks.console: {_target_: verl_ext.terminal.console.QuietConsole, log: runs/verl.log}

With `log=null` the log stays in the terminal.
"""

import atexit
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from io import TextIOWrapper
from itertools import count
from pathlib import Path
from typing import Any, TextIO

import ray
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from verl_ext.health import ENDED, NOTICE
from verl_ext.terminal.run_progress import RunProgress
from verl_ext.terminal.this_job import arguments

POLL_SECONDS = 0.2
TAIL = 15
"""Number of log lines that are shown when a run ends without returning to the callback."""
WIDTH = 200
"""Of such a line, of which those with a step's metrics have thousands of characters."""
LINES = 10
"""Number of lines about steps in a whole run, where there is no terminal."""
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_ORIGIN = re.compile(r"^\([^()]* pid=\d+[^()]*\) ")


def _seconds(since: float) -> str:
    return f"{time.monotonic() - since:.0f} s"


class _Console(Console):
    def on_broken_pipe(self) -> None:
        # rich would replace descriptor 1, which is the log, by /dev/null.
        self.quiet = True


class Display:
    """Shows a `RunProgress`: as a bar in a terminal, elsewhere by a line now and then.

    Args:
        out: the terminal, or what it was redirected to.
    """

    def __init__(self, out: TextIO) -> None:
        self._console = _Console(file=out, highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._in_terminal = self._console.is_terminal
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._bar = Progress(
            *(*columns, TextColumn("{task.fields[note]}"), TimeRemainingColumn()),
            console=self._console,
            transient=True,
            # rich would show what is printed above the bar, but it must go to the log.
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._bar.add_task("", total=None, note="")
        self._state = RunProgress()
        self._began = self._phase_began = time.monotonic()
        self._told = 0

    def start(self, greeting: str) -> None:
        """Begin with the first phase."""
        self._console.print(greeting)
        if self._in_terminal:
            self._bar.start()
        self._announce()

    def _announce(self) -> None:
        if self._in_terminal:
            self._bar.update(self._task, description=self._state.doing)
        else:
            self._print(self._state.doing)

    def _print(self, text: str) -> None:
        self._console.print(f"{_seconds(self._began):>6}  {text}")

    def feed(self, line: str) -> None:
        """Take a line of the log, and show what it says about the run."""
        phase, state = self._state.phase, self._state
        doing, began = state.doing, self._phase_began
        if ENDED in line:
            self._console.print(line, style="red")
        elif NOTICE in line:  # it may come right after verl's bar, which has no end of line
            self._console.print(line[line.index(NOTICE) :], style="yellow")
        if not state.feed(line):
            return
        if state.phase != phase:
            self._phase_began = time.monotonic()
            if self._in_terminal:
                self._console.print(f"  {doing} ({_seconds(began)})", style="dim")
            self._announce()
        if state.total:
            note = ", ".join(f"{name} {value:.3g}" for name, value in state.shown.items())
            self._bar.update(self._task, completed=state.step, total=state.total, note=note)
            tenth = state.step * LINES // state.total
            if not self._in_terminal and tenth > self._told:
                self._told = tenth
                self._print(f"step {state.step}/{state.total}: {note}")

    def stop(self) -> None:
        """Leave the terminal as it was."""
        if self._in_terminal:
            self._bar.stop()


class _Redirection:
    """Sends what this process, Ray and their children print to `path`, until `end` is called.

    Raises:
        OSError: the file cannot be written; nothing was redirected.
    """

    def __init__(self, path: Path, expect: str) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():  # it may say why an earlier run died
            numbered = (path.with_name(f"{path.name}.{n}") for n in count(1))
            path.replace(next(new for new in numbered if not new.exists()))
        # A file and no pipe: a pipe would stop children that outlive this process.
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._streams = [os.dup(1), os.dup(2)]
        self._display = Display(os.fdopen(os.dup(1), "w", buffering=1))
        self._display.start(f"verl's log: {path} (hydra.callbacks.console.log=null shows it here). {expect}")
        self.ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="quiet-console", daemon=True)
        self._flush()
        for stream in (1, 2):
            os.dup2(log, stream)
        os.close(log)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):
                stream.reconfigure(line_buffering=True)
        self._thread.start()

    @staticmethod
    def _flush() -> None:
        sys.stdout.flush()
        sys.stderr.flush()

    def _lines(self) -> Iterator[str]:
        """Yield the log's lines as they come; a progress bar ends its lines with a carriage return."""
        with self.path.open(errors="replace", newline="") as log:
            rest = ""
            while True:
                last = self.ended.is_set()
                *lines, rest = re.split(r"[\r\n]+", rest + log.read())
                yield from lines
                if last:
                    return
                self.ended.wait(POLL_SECONDS)

    def _follow(self) -> None:
        for line in self._lines():
            self._display.feed(_ORIGIN.sub("", _ESCAPES.sub("", line)))

    def end(self) -> None:
        """Give the terminal back when Ray has printed what it still had."""
        try:
            ray.shutdown()
            self._flush()
            self.ended.set()
            self._thread.join()
            self._display.stop()
        finally:
            self.ended.set()
            for stream, saved in zip((1, 2), self._streams, strict=True):
                os.dup2(saved, stream)
                os.close(saved)

    def tail(self) -> list[str]:
        """Return the log's last lines, the beginnings of long ones."""
        lines = [line for line in self.path.read_text(errors="replace").splitlines() if line.strip()]
        return [line[:WIDTH] for line in lines[-TAIL:]]


class QuietConsole(Callback):
    """Sends what the driver and Ray print to a file while the job runs, and shows progress instead.

    Args:
        log: the file; earlier ones are kept as `<log>.1`, `<log>.2` and so on. None: nothing is redirected.
        expect: a sentence about how long the run takes.
    """

    def __init__(self, log: str | None, expect: str = "") -> None:
        self._set(log, expect)
        self._redirection: _Redirection | None = None

    def _set(self, log: str | None, expect: str = "") -> None:
        self._path = Path(os.path.normpath(log)) if log else None
        self._expect = expect

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if (given := arguments(self, config)) is not None:
            self._set(**given)
        if self._path is None:
            return
        try:
            self._redirection = _Redirection(self._path, self._expect)
        except OSError as error:
            print(f"hydra.callbacks.console.log={self._path}: {error.strerror}; the log goes here.", file=sys.stderr)
            return
        atexit.register(self._uncaught)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        redirection, self._redirection = self._redirection, None
        if redirection is None:
            return
        redirection.end()
        if job_return.status is JobStatus.FAILED:
            print(f"The run failed; what led to it is in {redirection.path}.", file=sys.stderr)

    def _uncaught(self) -> None:
        """Show the log's end after an interrupt or an exit from within, whose words are in the log."""
        redirection, self._redirection = self._redirection, None
        if redirection is not None:
            redirection.end()
            words = [f"The run ended early; the last lines of {redirection.path}:", *redirection.tail()]
            print("\n".join(words), file=sys.stderr)
