"""Who is next, and how much of a prompt at once."""

from collections import deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from exporter.runtime.runner import CHUNK

T = TypeVar("T")
FIRST_CHUNK, LEAST_CHUNK = 32, 16  # tokens; fewer cost more each (590M int8: 4.9 ms at 16, 4.2 at 32, 3.9 at 128)


class Lines(Generic[T]):
    """Waiting ones: first come, first served within a line, and the lines take turns. Not for several threads."""

    def __init__(self) -> None:
        self._lines: dict[Hashable, deque[T]] = {}  # the next one's turn first

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def put(self, line: Hashable, one: T) -> None:
        self._lines.setdefault(line, deque()).append(one)

    def take(self) -> T:
        """IndexError when nobody waits."""
        if not self._lines:
            raise IndexError("nobody waits")
        key = next(iter(self._lines))
        line = self._lines.pop(key)
        one = line.popleft()
        if line:
            self._lines[key] = line  # at the end
        return one

    def remove(self, leaves: Callable[[T], bool]) -> list[T]:
        """Take out all for which `leaves` is true."""
        removed = [one for line in self._lines.values() for one in line if leaves(one)]
        if removed:
            kept = {key: deque(one for one in line if one not in removed) for key, line in self._lines.items()}
            self._lines = {key: line for key, line in kept.items() if line}
        return removed


class ChunkSize:
    """Tokens of a prompt that take about a given time, by what the last ones took."""

    def __init__(self) -> None:
        self._seconds: float | None = None  # per token

    def within(self, seconds: float) -> int:
        """At least LEAST_CHUNK, however little time there is."""
        if self._seconds is None:
            return FIRST_CHUNK
        return int(min(max(seconds / self._seconds, LEAST_CHUNK), CHUNK))

    def took(self, tokens: int, seconds: float) -> None:
        if tokens < LEAST_CHUNK and self._seconds is not None:
            return  # mostly the cost of any call
        one = max(seconds, 1e-9) / tokens
        self._seconds = one if self._seconds is None else (self._seconds + one) / 2
