"""One uvicorn server over a Service: its socket, its start, and its end, which no accepted stream notices."""

import asyncio
import errno
import signal
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import uvicorn

from exporter.errors import EnvironmentLacking, UsageError
from exporter.serving.app import build_app
from exporter.serving.connection import impatient
from exporter.serving.service import Service

LAST_BYTES = 5.0  # seconds for readers after their streams have ended
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one. UsageError for no port or host, EnvironmentLacking for a busy one."""
    if not 0 <= port < 65536:
        raise UsageError(f"port {port}", expected="0 (any free one) to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UsageError(f"host {host!r}: {error}", expected="a name or address of this machine") from error
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        known = {
            errno.EADDRINUSE: f"port {port} on {host} is in use",
            errno.EACCES: f"port {port} on {host} may not be used by this user",
            errno.EADDRNOTAVAIL: f"{host} is no address of this machine",
        }
        seen = known.get(error.errno or 0, f"port {port} on {host}: {error}")
        raise EnvironmentLacking(seen, todo="choose another --port (0 takes a free one) or --host") from error
    return bound


def address_of(bound: socket.socket) -> str:
    """http://HOST:PORT of a socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(bound: socket.socket) -> bool:
    host = bound.getsockname()[0]
    return host.startswith("127.") or host == "::1"


class Server(uvicorn.Server):
    """`on_started` is called when connections are accepted. End it with `stop`."""

    def __init__(self, service: Service, bound: socket.socket, *, drain: float, on_started: Callable[[], object]):
        config = uvicorn.Config(
            build_app(service),
            http=impatient(service.limits),
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=max(1, round(LAST_BYTES)),
        )
        super().__init__(config)
        self.signal: int | None = None  # the first that came
        self._service, self._bound, self._drain, self._on_started = service, bound, drain, on_started
        self._stopping: asyncio.Task[None] | None = None

    async def run_until_stopped(self) -> None:
        """Serve until `stop`, or where signals can be caught (the main thread) until SIGTERM or SIGINT."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._uncaught)
        caught = []
        for number in SIGNALS:
            try:
                loop.add_signal_handler(number, self._signalled, number)
                caught.append(number)
            except (ValueError, RuntimeError, NotImplementedError):  # another thread, another platform
                pass
        try:
            await self.serve([self._bound])
            if self._stopping is not None:
                await self._stopping
        finally:
            for number in caught:
                loop.remove_signal_handler(number)

    def stop(self) -> None:
        """Take no new request, finish the accepted ones, end. A second call does not wait. In the loop's thread."""
        if self._stopping is None:
            self._service.draining = True
            self._stopping = asyncio.ensure_future(self._end())
        else:
            self._service.log.write("warning", "hurried", running=self._service.in_flight)
            self._hurry.set()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """uvicorn's own handling would close the socket at once: clients would see refused connections, no 503."""
        self._hurry = asyncio.Event()
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()

    def _uncaught(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A defect in a connection or a task of its own. asyncio would tell its logger, which may be silent."""
        error = context.get("exception")
        if error is None:
            self._service.log.write("error", "internal_error", message=context["message"])
        else:
            self._service.log.defect(error, where=context["message"])

    def _signalled(self, number: int) -> None:
        self.signal = self.signal or number
        self._service.log.write("info", "signal", signal=signal.Signals(number).name, running=self._service.in_flight)
        self.stop()

    async def _end(self) -> None:
        waiting = asyncio.ensure_future(self._service.idle(self._drain))
        hurry = asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait({waiting, hurry}, return_when=asyncio.FIRST_COMPLETED)
        drained = waiting.done() and waiting.result()
        for task in (waiting, hurry):
            task.cancel()
        if not drained:
            self._service.log.write("warning", "drain_timeout", running=self._service.in_flight)
        # What still runs ends now, with the reason shutdown.
        await asyncio.to_thread(self._service.stop)
        self._service.log.write("info", "stopped", drained=drained)
        self.should_exit = True
