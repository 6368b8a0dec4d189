"""How long work tells that it is alive. The command line chooses what is shown; functions only report."""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Task(Protocol):
    def advance(self, amount: float = 1) -> None:
        """`amount` more of the task's total is done."""
        ...


class Progress(Protocol):
    def task(self, title: str, total: float, unit: str = "") -> "TaskContext":
        """A context manager that yields a Task; `unit` is "B" for bytes, else a plural noun such as "documents"."""
        ...

    def note(self, message: str) -> None:
        """One line that the user should see, such as a stage that is skipped."""
        ...


TaskContext = AbstractContextManager[Task, bool | None]


class _Nothing:
    def advance(self, amount: float = 1) -> None:
        pass


class Silent:
    """Reports nowhere: the default of every function."""

    def task(self, title: str, total: float, unit: str = "") -> "TaskContext":
        return nullcontext(_Nothing())

    def note(self, message: str) -> None:
        pass


SILENT = Silent()
