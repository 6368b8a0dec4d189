"""Progress for people: bars on a terminal, plain lines at intervals elsewhere, nothing when quiet."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.progress import Task as RichTask
from rich.text import Text

from exporter.files import human_bytes
from exporter.progress import SILENT, Progress, Task

INTERVAL_SECONDS = 10.0


def terminal_progress(*, quiet: bool = False, stream: TextIO | None = None) -> Progress:
    """What the command line hands to every function. `stream` is stderr, so that stdout stays for results."""
    if quiet:
        return SILENT
    target: TextIO = stream or sys.stderr
    return Bars(Console(file=target)) if target.isatty() else Lines(target)


class _Amount(ProgressColumn):
    """`3.1 GB of 13.3 GB`, `12 of 128 documents`."""

    def render(self, task: RichTask) -> Text:
        return Text(_amount(task.completed, task.total or 0, task.fields["unit"]), style="progress.download")


class _Bar:
    def __init__(self, display: RichProgress, title: str, total: float, unit: str) -> None:
        self._display = display
        self._task = display.add_task(title, total=total, unit=unit)

    def advance(self, amount: float = 1) -> None:
        self._display.advance(self._task, amount)


class Bars:
    """Live bars, one for each task under way. Nothing is live between tasks, so that results print undisturbed."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._display: RichProgress | None = None
        self._running = 0

    @contextmanager
    def task(self, title: str, total: float, unit: str = "") -> Iterator[Task]:
        if self._display is None:
            self._display = self._new_display()
            self._display.start()
        self._running += 1
        try:
            yield _Bar(self._display, title, total, unit)
        finally:
            self._running -= 1
            if self._running == 0:
                self._display.stop()
                self._display = None

    def note(self, message: str) -> None:
        self._console.print(message, markup=False, highlight=False)

    def _new_display(self) -> RichProgress:
        title = TextColumn("{task.description}", markup=False)
        return RichProgress(
            title, BarColumn(), _Amount(), TimeElapsedColumn(), TimeRemainingColumn(), console=self._console
        )


class Lines:
    """A line when a task ends, and one every `interval` seconds while it runs: for logs."""

    def __init__(
        self, stream: TextIO, *, interval: float = INTERVAL_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream, self._interval, self._clock = stream, interval, clock
        self._lock = threading.Lock()

    @contextmanager
    def task(self, title: str, total: float, unit: str = "") -> Iterator[Task]:
        line = _Line(self, title, total, unit)
        try:
            yield line
        except BaseException:
            self.note(f"{line.state()}, stopped")
            raise
        self.note(f"{line.state()}, done")

    def note(self, message: str) -> None:
        with self._lock:
            self._stream.write(message + "\n")
            self._stream.flush()

    def now(self) -> float:
        return self._clock()

    @property
    def interval(self) -> float:
        return self._interval


class _Line:
    def __init__(self, lines: Lines, title: str, total: float, unit: str) -> None:
        self._lines, self._title, self._total, self._unit = lines, title, total, unit
        self._done = 0.0
        self._began = self._shown = lines.now()
        self._lock = threading.Lock()

    def advance(self, amount: float = 1) -> None:
        with self._lock:
            self._done += amount
            now = self._lines.now()
            due = now - self._shown >= self._lines.interval
            if due:
                self._shown = now
        if due:
            self._lines.note(self.state())

    def state(self) -> str:
        """`merge: 45 % (6.0 GB of 13.3 GB) after 32 s`"""
        share = f"{100 * self._done / self._total:.0f} % " if self._total else ""
        elapsed = self._lines.now() - self._began
        return f"{self._title}: {share}({_amount(self._done, self._total, self._unit)}) after {elapsed:.0f} s"


def _amount(done: float, total: float, unit: str) -> str:
    if unit == "B":
        return f"{human_bytes(done)} of {human_bytes(total)}"
    return f"{done:.0f} of {total:.0f} {unit}".rstrip()
