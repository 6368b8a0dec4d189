"""A request's body: as JSON by its own word, not larger than allowed, not slower than allowed."""

import asyncio

from starlette.requests import Request as HttpRequest

from exporter.serving.failures import Failure
from exporter.serving.service import Limits

# A client that is cut off in the middle of sending does not read the refusal: this much is read and thrown away.
LINGER = 8_000_000


async def read_body(request: HttpRequest, limits: Limits) -> bytes:
    """Failure for another content type (415), too many bytes (413) or too slow a sender (408)."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Failure(415, f"content-type {kind[:100]!r}; expected: application/json", "unsupported_media_type")
    try:
        async with asyncio.timeout(limits.read):
            content, size = await _read(request, limits.body)
    except TimeoutError:
        seen = f"the body did not arrive within {limits.read:g} s"
        raise Failure(408, seen, "request_timeout", headers={"Connection": "close"}) from None
    if size > limits.body:
        seen = f"the body is larger than {limits.body} bytes"
        raise Failure(413, seen, "request_too_large", headers={"Connection": "close"})
    return content


async def _read(request: HttpRequest, limit: int) -> tuple[bytes, int]:
    """The body, and its size as far as it was looked at: beyond the limit nothing is kept."""
    announced = request.headers.get("content-length", "")
    size = int(announced) if announced.isdecimal() and len(announced) < 20 else 0
    if size > limit + LINGER:
        return b"", size
    parts: list[bytes] = []
    received = 0
    async for part in request.stream():
        received += len(part)
        if received <= limit:
            parts.append(part)
        elif received > limit + LINGER:
            break
    return b"".join(parts), max(received, size)


async def gone(request: HttpRequest) -> None:
    """Returns when the client has gone away. Only after the body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
