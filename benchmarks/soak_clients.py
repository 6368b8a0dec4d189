"""The clients of soak.py: each asks once, checks what it got, and says what became of it."""

import asyncio
import json
import random
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from soak_cases import Bad, Case

PATIENCE = 120.0  # seconds until a request counts as stuck
BUFFER = 2048  # bytes that a slow reader's socket takes at once


class Wrong(Exception):
    """What must not happen."""


@dataclass
class Target:
    """The server. stopped_at: when SIGTERM was sent to it, on the monotonic clock."""

    address: str
    stopped_at: float | None = None

    def may_refuse(self, sent: "Sent") -> bool:
        """Whether a request may find a closed door: it had no connection yet when SIGTERM was sent."""
        return self.stopped_at is not None and (sent.connected is None or sent.connected >= self.stopped_at)


@dataclass
class Sent:
    """One request. connected: when its connection stood; on a busy machine that is long after it began."""

    connected: float | None = None

    async def trace(self, name: str, info: Mapping[str, Any]) -> None:
        """httpx calls this with each step of a request (its extension "trace")."""
        if name == "connection.connect_tcp.complete":
            self.connected = time.monotonic()


async def whole(target: Target, case: Case, chance: random.Random) -> str:
    """The answer in one document."""
    return await _guarded(target, lambda sent: _whole(target, case, sent))


async def streamed(target: Target, case: Case, chance: random.Random) -> str:
    return await _guarded(target, lambda sent: _streamed(target, case, sent))


async def cancelled(target: Target, case: Case, chance: random.Random) -> str:
    """Goes away after some pieces; what came until then is the beginning of the answer."""
    return await _guarded(target, lambda sent: _streamed(target, case, sent, leave_after=chance.randint(0, 6)))


async def slow(target: Target, case: Case, chance: random.Random) -> str:
    """Reads through a small window, with pauses: the server has to wait for it, and nobody else."""
    return await _guarded(target, lambda sent: _streamed(target, case, sent, pause=chance.uniform(0.02, 0.15)))


async def refused(target: Target, bad: Bad, chance: random.Random) -> str:
    """A request that is wrong, and has to be told so."""
    return await _guarded(target, lambda sent: _refused(target, bad, sent))


async def rude(target: Target, case: Case, chance: random.Random) -> str:
    """Opens a connection, sends no request, half of one, or no HTTP at all, and goes away."""
    host, port = target.address.removeprefix("http://").split(":")
    body = json.dumps(case.body).encode()
    head = f"POST {case.path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    half = head.encode() + b"\r\n" + body[: len(body) // 2]
    try:
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(chance.choice((b"", b"\x16\x03\x01\x02", b"POST /v1/", half)))
        await writer.drain()
        await asyncio.sleep(chance.uniform(0, 1))
        writer.close()
        await writer.wait_closed()
    except OSError:
        pass
    return "went away"


async def _guarded(target: Target, client: Callable[[Sent], Awaitable[str]]) -> str:
    """Closed doors are an outcome after SIGTERM, and a defect at any other time."""
    sent = Sent()
    try:
        async with asyncio.timeout(PATIENCE):
            return await client(sent)
    except TimeoutError:
        raise Wrong(f"no answer within {PATIENCE:.0f} s") from None
    except httpx.TransportError as error:
        if target.may_refuse(sent):
            return "closed after SIGTERM"
        raise Wrong(f"lost: {type(error).__name__} {error}") from error


async def _whole(target: Target, case: Case, sent: Sent) -> str:
    async with httpx.AsyncClient(timeout=PATIENCE) as client:
        url, traced = target.address + case.path, {"trace": sent.trace}
        response = await client.post(url, json=case.body, extensions=traced)
    if response.status_code != 200:
        return _refusal(target, response.status_code, response.headers, response.content)
    choices = response.json()["choices"]
    for choice in choices:
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        _compare(case, choice["index"], text, choice["finish_reason"])
    if len(choices) != len(case.texts):
        raise Wrong(f"{len(choices)} choices of {len(case.texts)}")
    return "answered"


async def _streamed(
    target: Target, case: Case, sent: Sent, *, leave_after: int | None = None, pause: float = 0.0
) -> str:
    options = [(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)] if pause else None
    transport = httpx.AsyncHTTPTransport(socket_options=options)
    body, traced = {**case.body, "stream": True}, {"trace": sent.trace}
    texts, reasons = [""] * len(case.texts), [""] * len(case.texts)
    async with (
        httpx.AsyncClient(timeout=PATIENCE, transport=transport) as client,
        client.stream("POST", target.address + case.path, json=body, extensions=traced) as response,
    ):
        if response.status_code != 200:
            return _refusal(target, response.status_code, response.headers, await response.aread())
        pieces = 0
        async for event in _events(response, pause):
            choice = event["choices"][0]
            piece = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            texts[choice["index"]] += piece
            reasons[choice["index"]] = choice["finish_reason"] or reasons[choice["index"]]
            pieces += 1
            if leave_after is not None and pieces > leave_after:
                _compare_beginnings(case, texts)
                return "went away"
    for number, (text, reason) in enumerate(zip(texts, reasons, strict=True)):
        _compare(case, number, text, reason)
    return "answered"


async def _events(response: httpx.Response, pause: float) -> AsyncIterator[Mapping[str, Any]]:
    """The documents of a stream; Wrong where it breaks off, or ends with an error."""
    done = False
    async for line in response.aiter_lines():
        if line == "data: [DONE]":
            done = True
        elif line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise Wrong(f"an accepted stream was lost: {event['error']['message']}")
            yield event
            await asyncio.sleep(pause)
    if not done:
        raise Wrong("a stream ended without [DONE]")


async def _refused(target: Target, bad: Bad, sent: Sent) -> str:
    url, traced = target.address + bad.path, {"trace": sent.trace}
    async with httpx.AsyncClient(timeout=PATIENCE) as client:
        response = await client.request(bad.method, url, content=bad.data, headers=bad.headers, extensions=traced)
    if response.status_code != bad.status:
        if response.status_code == 200:
            raise Wrong(f"{bad.name}: it was answered")
        return _refusal(target, response.status_code, response.headers, response.content)
    _message(response.content)
    return f"refused: {bad.status}"


def _refusal(target: Target, status: int, headers: httpx.Headers, content: bytes) -> str:
    """What a good request may be told: that the queue is full, or (after SIGTERM) that the server ends."""
    error = _message(content)
    if status == 429 and error["code"] == "queue_full" and int(headers["retry-after"]) > 0:
        return "refused: queue full"
    if status == 503 and error["code"] == "shutting_down" and target.stopped_at is not None:
        return "refused: shutting down"
    raise Wrong(f"{status}: {error}")


def _message(content: bytes) -> Mapping[str, Any]:
    """OpenAI's error object, with a message that says something."""
    try:
        error = json.loads(content)["error"]
    except (ValueError, KeyError, TypeError):
        raise Wrong(f"no error object: {content[:200]!r}") from None
    if not error.get("message"):
        raise Wrong(f"an error without a message: {error}")
    return error


def _compare(case: Case, number: int, text: str, reason: str) -> None:
    if text != case.texts[number]:
        raise Wrong(f"a wrong token, {case.body}: choice {number} is {text!r}, alone {case.texts[number]!r}")
    if reason != case.reasons[number]:
        raise Wrong(f"{case.body}: choice {number} ended with {reason!r}, alone with {case.reasons[number]!r}")


def _compare_beginnings(case: Case, texts: list[str]) -> None:
    for number, text in enumerate(texts):
        if not case.texts[number].startswith(text):
            raise Wrong(f"a wrong token, {case.body}: choice {number} begins {text!r}, alone {case.texts[number]!r}")
