"""Streams of requests against a server that speaks OpenAI's API, and when each piece of an answer came."""

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

READY_SECONDS = 120.0


@dataclass
class Answer:
    """first: seconds from the request to the first piece of text. gaps: seconds between two pieces.

    tokens: all that were asked for where the answer ends for its length, else one for each piece.
    """

    first: float = 0.0
    gaps: list[float] = field(default_factory=list)
    text: str = ""
    reason: str = ""
    tokens: int = 0


@dataclass(frozen=True)
class Load:
    """seconds: from the first request to the last piece."""

    seconds: float
    answers: list[Answer]

    @property
    def tokens(self) -> int:
        return sum(answer.tokens for answer in self.answers)


def wait_until_ready(process: subprocess.Popen[bytes], url: str) -> bool:
    """Whether `url` answers 200; False if the server has ended. RuntimeError after READY_SECONDS."""
    until = time.monotonic() + READY_SECONDS
    while time.monotonic() < until:
        if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
            return False
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return True
        except httpx.HTTPError:
            time.sleep(0.1)
    raise RuntimeError(f"{url} was not ready after {READY_SECONDS:.0f} s")


def ask_and_stop(
    process: subprocess.Popen[bytes],
    address: str,
    ready: str,
    streams: Sequence[Sequence[str]],
    warm: str,
    body: Mapping[str, Any],
) -> Load | None:
    """One stream for each list of prompts, which it asks one after the other. None if the server has ended.

    A first request, `warm`, is not counted. The server is stopped with SIGTERM, whatever happens.
    """
    if not wait_until_ready(process, address + ready):
        return None
    try:
        model = httpx.get(f"{address}/v1/models", timeout=READY_SECONDS).json()["data"][0]["id"]
        return asyncio.run(_load(address, streams, warm, {"model": model, **body}))
    finally:
        process.send_signal(signal.SIGTERM)


async def _load(address: str, streams: Sequence[Sequence[str]], warm: str, body: Mapping[str, Any]) -> Load:
    # A connection for each request: llama-server closes some that it has said it would keep.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits) as client:
        await _ask(client, {**body, "prompt": warm, "max_tokens": 4})

        async def one(prompts: Sequence[str]) -> list[Answer]:
            return [await _ask(client, {**body, "prompt": prompt}) for prompt in prompts]

        began = time.perf_counter()
        found = await asyncio.gather(*map(one, streams))
        return Load(time.perf_counter() - began, [answer for answers in found for answer in answers])


async def _ask(client: httpx.AsyncClient, body: Mapping[str, Any]) -> Answer:
    """RuntimeError for an error, before the first piece or in the middle."""
    answer, pieces = Answer(), 0
    last = began = time.perf_counter()
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode(errors='replace')[:300]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise RuntimeError(f"in the middle of an answer: {event['error']}")
            choice = event["choices"][0]
            answer.reason = choice["finish_reason"] or answer.reason
            if choice["text"]:
                now = time.perf_counter()
                if pieces:
                    answer.gaps.append(now - last)
                else:
                    answer.first = now - began
                last, pieces = now, pieces + 1
                answer.text += choice["text"]
    answer.tokens = body["max_tokens"] if answer.reason == "length" else pieces
    return answer
