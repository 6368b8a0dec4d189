"""A server in a thread: the real application, engine and uvicorn, on a free port."""

import asyncio
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from openai import OpenAI

from exporter.runtime.load import load
from exporter.serving.engine import BatchingEngine
from exporter.serving.logs import JsonLog
from exporter.serving.models import bundled, split_name
from exporter.serving.server import Server, address_of, listen
from exporter.serving.service import Limits, Service


@dataclass(frozen=True, slots=True)
class Running:
    url: str
    service: Service
    log: io.StringIO
    bound: socket.socket
    stop: Callable[[], object]  # as a signal does

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        """`body` as JSON, or with `content` anything at all."""
        given: dict[str, Any] = {} if "content" in options else {"json": body}
        return httpx.post(self.url + path, timeout=60, **(given | options))

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **options)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.getvalue().splitlines()]

    def metric(self, name: str, **labels: str) -> float:
        """A sample's value, 0 where there is none yet."""
        wanted = {f'{key}="{value}"' for key, value in labels.items()}
        for line in self.get("/metrics").text.splitlines():
            head, _, value = line.rpartition(" ")
            own, _, found = head.partition("{")
            if own == name and wanted == set(filter(None, found.rstrip("}").split(","))):
                return float(value)
        return 0.0


@contextmanager
def running(
    bundles: Sequence[str],
    *,
    slots: int = 8,
    queue: int = 64,
    limits: Limits | None = None,
    api_key: str | None = None,
    log_prompts: bool = False,
    drain: float = 10.0,
) -> Iterator[Running]:
    log = io.StringIO()
    output = JsonLog(log)
    opened = []
    for name, directory in map(split_name, bundles):
        runner = load(directory, threads=1)
        engine = BatchingEngine(runner, slots=slots, queue=queue, on_defect=output.defect)
        opened.append(bundled(name, engine, runner.bundle, runner.provider))
    service = Service(opened, output, limits, api_key, log_prompts)
    bound = listen("127.0.0.1", 0)
    started = threading.Event()
    server = Server(service, bound, drain=drain, on_started=started.set)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=[server.run_until_stopped()], daemon=True)
    url = address_of(bound)
    service.start()
    thread.start()
    assert started.wait(20)
    try:
        yield Running(url, service, log, bound, lambda: loop.call_soon_threadsafe(server.stop))
    finally:
        loop.call_soon_threadsafe(server.stop)
        thread.join(30)
        assert not thread.is_alive()
        loop.close()


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def of_defects(lines: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    found = [line for line in lines if line["event"] == "internal_error"]
    assert all("Traceback (most recent call last)" in line["traceback"] for line in found)
    return [(line["level"], line["exception"], line["message"]) for line in found]
