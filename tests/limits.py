"""Time and memory of what runs in a test: a hang or a bomb fails the test and does not end the run."""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS = 10.0  # of computing; of waiting, so many times as much, for a machine may have other work
PATIENCE = 12
MEMORY = 2 << 30  # address space that one command may add to what this process has


class TooLate(BaseException):
    """Not an Exception: nothing on the way out may take it for an error of its own."""


@contextmanager
def limits(seconds: float = SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """A hang ends in TooLate, a bomb in MemoryError: both are failures of a test. seconds: of all threads together."""

    def late(*_: object) -> None:
        raise TooLate(f"more than {seconds} seconds of computing, or {PATIENCE} times that of waiting")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handlers = {number: signal.signal(number, late) for number in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE * seconds)
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, before[1]))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)
