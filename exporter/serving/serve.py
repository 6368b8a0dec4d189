"""`exporter serve`: bundles behind OpenAI's API."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from exporter.errors import UsageError
from exporter.runtime.load import load
from exporter.serving.engine import BatchingEngine
from exporter.serving.logs import JsonLog
from exporter.serving.models import Bundled, bundled, split_name
from exporter.serving.server import Server, address_of, is_loopback, listen
from exporter.serving.service import Limits, Service

API_KEY = "EXPORTER_API_KEY"
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@dataclass(frozen=True, slots=True)
class Ready:
    """A server that takes requests at `url`. models: their names and what /v1/models says of them."""

    url: str
    models: tuple[dict[str, Any], ...]
    api_key: bool
    pid: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Ended:
    """A server that has ended: 143 after SIGTERM, 130 after SIGINT."""

    url: str
    exit_code: int


def serve(
    bundle: str | Path | Sequence[str | Path],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    provider: str | None = None,
    threads: int | None = None,
    slots: int = 16,
    cache_memory: int | None = None,
    queue: int = 64,
    api_key_file: str | Path | None = None,
    max_body: int = 1_000_000,
    request_timeout: float = 600.0,
    drain_timeout: float = 30.0,
    log: TextIO | None = None,
    quiet: bool = False,
    log_prompts: bool = False,
    on_ready: Callable[[Ready], object] | None = None,
) -> Ended:
    """Serve bundles, each DIR or NAME=DIR, until SIGTERM or SIGINT; accepted requests are finished before the end.

    slots: streams of a bundle that are computed at once, at most. cache_memory: bytes that a bundle's key-value cache
    may take, which bounds the slots too; default half of the free memory. queue: streams that may wait for a slot.
    The API key is the content of `api_key_file`, else of EXPORTER_API_KEY, or there is none. max_body: bytes a request.
    request_timeout, drain_timeout: seconds. log: where JSON lines go, default stderr. on_ready: called once.
    Raises UsageError, InputRefused (a bundle), EnvironmentLacking (port, memory, provider).
    """
    given = [bundle] if isinstance(bundle, str | Path) else list(bundle)
    if not given:
        raise UsageError("no bundle to serve", expected="at least one directory")
    key = read_api_key(api_key_file)
    names = [split_name(one) for one in given]
    output = JsonLog(sys.stderr if log is None else log, quiet)
    # A request for more texts than the queue holds could never be taken.
    limits = Limits(body=max_body, choices=min(Limits().choices, queue), request=request_timeout)
    bound = listen(host, port)
    try:
        opened: list[Bundled] = []
        for name, directory in names:
            runner = load(directory, provider=provider, threads=threads)
            engine = BatchingEngine(runner, slots=slots, cache_bytes=cache_memory, queue=queue, on_defect=output.defect)
            opened.append(bundled(name, engine, runner.bundle, runner.provider))
        service = Service(opened, output, limits, key, log_prompts)
        service.start()
        try:
            return asyncio.run(_serve(service, bound, drain_timeout, on_ready))
        finally:
            service.stop()
    finally:
        bound.close()


async def _serve(
    service: Service, bound: socket.socket, drain: float, on_ready: Callable[[Ready], object] | None
) -> Ended:
    url = address_of(bound)
    described = tuple(model.to_dict() for model in service.models.values())

    def started() -> None:
        if not is_loopback(bound) and not service.guarded:
            service.log.write(
                "warning", "open", url=url, message=f"anyone who reaches this address may use it: set {API_KEY}"
            )
        service.log.write("info", "ready", url=url, models=list(service.models), api_key=service.guarded)
        if on_ready is not None:
            on_ready(Ready(url, described, service.guarded, os.getpid()))

    server = Server(service, bound, drain=drain, on_started=started)
    await server.run_until_stopped()
    return Ended(url, EXIT_CODES.get(signal.Signals(server.signal), 0) if server.signal else 0)


def read_api_key(file: str | Path | None) -> str | None:
    """UsageError for a key that no header can carry, or a file that cannot be read."""
    if file is None:
        text, source = os.environ.get(API_KEY), API_KEY
    else:
        source = str(file)
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"the API key's file cannot be read: {error}", expected="one line of text") from error
    if text is None:
        return None
    key = text.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(f"{source} holds no usable API key", expected="one line of printable ASCII without spaces")
    return key
