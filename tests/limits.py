"""Time and memory of what runs in a test: a hang or a bomb fails the test and does not end the run."""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS = 10.0
MEMORY = 2 << 30  # address space that one command may add to what this process has


class TooLate(BaseException):
    """Not an Exception: nothing on the way out may take it for an error of its own."""


@contextmanager
def limits(seconds: float = SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """A hang ends in TooLate, a bomb in MemoryError: both are failures of a test."""

    def late(*_: object) -> None:
        raise TooLate(f"more than {seconds} seconds")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    old = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, before[1]))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        resource.setrlimit(resource.RLIMIT_AS, before)
