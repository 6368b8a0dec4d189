"""A model whose next token is arithmetic on what lies in its cache: a wrong row, slot or length gives a wrong token."""

import asyncio
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from exporter.runtime.cache import CacheShape, KeyValueCache
from exporter.runtime.runner import Runner, next_chunk
from exporter.serving.engine import BatchingEngine
from exporter.serving.requests import Request, Step

VOCABULARY, POSITIONS, STOP = 97, 64, 96
POISON, FAULT = 90, 91  # in a prompt: not finite logits behind the first, an exception at the second


def continuation(prompt: Sequence[int], count: int, adapter: str | None = None) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_of(np.array(tokens), adapter))
    return tokens[len(prompt) :]


def next_of(tokens: np.ndarray, adapter: str | None) -> int:
    """0 to 88: never a token with a meaning."""
    weights = np.arange(1, len(tokens) + 1)
    return int((tokens * weights).sum() * 31 + 7 * len(tokens) + 13 * len(adapter or "")) % 89


class ArithmeticRunner:
    """What the engine uses of a Runner. `pause`: seconds for each token of a call. Logits are one-hot."""

    provider, n_positions, vocab_size, stop_tokens = "cpu", POSITIONS, VOCABULARY, (STOP,)

    def __init__(self, adapter: str | None = None, adapters: Sequence[str] = (), pause: float = 0.0) -> None:
        self.adapter, self.pause = adapter, pause
        self.bundle = SimpleNamespace(section={"adapters": {name: {} for name in adapters}}, directory="arithmetic")
        self.calls: list[tuple[str | None, int, int]] = []  # adapter, rows, tokens a row

    def with_adapter(self, name: str | None) -> "ArithmeticRunner":
        other = ArithmeticRunner(name, tuple(self.bundle.section["adapters"]), self.pause)
        other.calls = self.calls
        return other

    def cache_bytes(self, rows: int, capacity: int) -> int:
        return 8 * rows * capacity

    def new_cache(self, rows: int, capacity: int) -> KeyValueCache:
        return KeyValueCache(CacheShape(1, 1, 1, np.float32, "cpu"), rows, capacity)

    def next_chunk(self, remaining: int, chunk: int) -> int:
        return next_chunk(remaining, chunk, 16)

    def append(self, cache: KeyValueCache, first: int, token_ids: np.ndarray, keep: int = 1) -> np.ndarray:
        count, new = token_ids.shape
        self.calls.append((self.adapter, count, new))
        time.sleep(self.pause * new)
        logits = np.zeros((count, new, VOCABULARY), np.float32)
        for i, row in enumerate(range(first, first + count)):
            assert cache.adapters[row] == self.adapter
            for j, token in enumerate(token_ids[i]):
                if token == FAULT and new > 1:
                    raise RuntimeError("a fault of the session")
                slot = int(cache.lengths[row]) + j
                cache._buffers[0][row, 0, slot, 0] = float(token)
                held = held_tokens(cache, row, slot + 1)
                poisoned = new > 1 and POISON in token_ids[i, : j + 1]
                logits[i, j, next_of(held, self.adapter)] = np.nan if poisoned else 1
        cache.lengths[first : first + count] += new
        return logits[:, -keep:]


def held_tokens(cache: KeyValueCache, row: int, length: int) -> np.ndarray:
    return cache._buffers[0][row, 0, :length, 0].numpy().astype(int)


def as_runner(runner: ArithmeticRunner) -> Runner:
    return cast(Runner, runner)


async def read(stream: Any) -> list[Step]:
    return [step async for step in stream]


def ids(steps: Iterable[Step]) -> list[int]:
    return [step.id for step in steps if step.id is not None]


def asked(prompt: Sequence[int], count: int = 8, **options: Any) -> Request:
    return Request(tuple(prompt), count, **options)


def run(main: Any) -> Any:
    """The result of a coroutine; TimeoutError rather than a test that hangs."""
    return asyncio.run(asyncio.wait_for(main, 60))


@contextmanager
def started(pause: float = 0.0, adapters: tuple[str, ...] = (), **options: Any) -> Iterator[BatchingEngine]:
    options = {"slots": 4, "cache_bytes": 1 << 20} | options
    engine = BatchingEngine(as_runner(ArithmeticRunner(adapters=adapters, pause=pause)), **options)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()
        assert not engine.alive
