"""Between the worker's thread and the event loops: one stream's steps on their way to its reader."""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence

from exporter.errors import ExporterError
from exporter.serving.requests import Request, Step

Event = Step | ExporterError


class EngineStream:
    """`requests.Stream`. Only the event loop in which it was made touches its queue."""

    def __init__(self, request: Request, wake: Callable[[], object]) -> None:
        self.request = request
        self.loop = asyncio.get_running_loop()
        self.cancelled = False
        self.cached_tokens = 0
        self.prompt_logprobs: tuple[Step, ...] | None = None
        self._wake = wake
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._ended = False

    def __aiter__(self) -> "EngineStream":
        return self

    async def __anext__(self) -> Step:
        if self._ended:
            raise StopAsyncIteration
        event = await self._events.get()
        self._ended = isinstance(event, ExporterError) or event.reason is not None
        if isinstance(event, ExporterError):
            raise event
        return event

    def cancel(self) -> None:
        self.cancelled = True
        self._wake()

    def receive(self, event: Event) -> None:
        self._events.put_nowait(event)


def deliver(events: Sequence[tuple[EngineStream, Event]]) -> None:
    """Hand events over, with one call for each event loop. A stream whose loop has closed is cancelled."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[EngineStream, Event]]] = defaultdict(list)
    for stream, event in events:
        by_loop[stream.loop].append((stream, event))
    for loop, its in by_loop.items():
        try:
            loop.call_soon_threadsafe(_receive_all, its)
        except RuntimeError:  # the loop is closed
            for stream, _ in its:
                stream.cancelled = True


def _receive_all(events: Sequence[tuple[EngineStream, Event]]) -> None:
    for stream, event in events:
        stream.receive(event)
