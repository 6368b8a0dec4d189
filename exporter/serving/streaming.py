"""Answers on their way: server-sent events, and an end to the work when the client has gone."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from exporter.serving.failures import Failure
from exporter.serving.generation import Choice, Piece, interleaved
from exporter.serving.reading import gone

Result = TypeVar("Result")
DONE = b"data: [DONE]\n\n"


async def unless_gone(request: HttpRequest, work: Awaitable[Result]) -> Result:
    """The result of `work`; it is cancelled, and ClientDisconnect raised, when the client goes away before."""
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def collected(request: HttpRequest, choices: Sequence[Choice]) -> list[list[Piece]]:
    """Every choice's pieces, when all have ended. Raises Failure, ClientDisconnect; the streams end in any case."""
    found: list[list[Piece]] = [[] for _ in choices]

    async def collect() -> None:
        async for piece in interleaved(choices):
            found[piece.index].append(piece)

    try:
        await unless_gone(request, collect())
    finally:
        cancel(choices)
    return found


async def begun(request: HttpRequest, choices: Sequence[Choice]) -> AsyncIterator[Piece]:
    """The pieces from the first on, which has come already: what fails before it still gets a status of its own."""
    pieces = interleaved(choices)
    try:
        first = await unless_gone(request, anext(pieces))
    except BaseException:
        cancel(choices)
        raise
    return _rejoined(first, pieces)


async def _rejoined(first: Piece, rest: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
    yield first
    async for piece in rest:
        yield piece


class EventStream(StreamingResponse):
    """`documents` as server-sent events, then [DONE]. However it ends, the choices' streams end with it."""

    def __init__(self, request: HttpRequest, documents: AsyncIterator[dict[str, Any]], choices: Sequence[Choice]):
        # no-transform and X-Accel-Buffering: a proxy must not hold events back.
        headers = {"Cache-Control": "no-store, no-transform", "X-Accel-Buffering": "no"}
        super().__init__(_events(request, documents), headers=headers, media_type="text/event-stream")
        self._choices = choices

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            cancel(self._choices)


async def _events(request: HttpRequest, documents: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """A failure in the middle is an event too, as OpenAI's clients expect it, and the last one."""
    try:
        async for document in documents:
            yield event(document)
    except Failure as failure:
        request.state.facts.error, request.state.facts.failed = failure.code, failure.status
        yield event(failure.body())
        return
    yield DONE


def event(document: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def cancel(choices: Sequence[Choice]) -> None:
    for choice in choices:
        choice.stream.cancel()
