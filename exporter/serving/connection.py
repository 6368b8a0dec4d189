"""uvicorn's HTTP/1.1 connection, less patient: with who sends no request or a broken one, or reads no answer."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from exporter.serving.service import Limits


class Connection(H11Protocol):
    """uvicorn itself bounds only the time between two requests (timeout_keep_alive)."""

    limits = Limits()

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._head: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        # Writing pauses while a single byte waits here, or who leaves the end of an answer unread is never found out.
        transport.set_write_buffer_limits(0)
        self._head = self.loop.call_later(self.limits.read, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:  # a request's head is there
            self._head = _stop(self._head)
        elif self._head is None:
            self._head = self.loop.call_later(self.limits.read, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """A body that breaks off is found out when its request is being answered already: that answer ends here.

        uvicorn would go on with both, and h11 takes no second answer to one request.
        """
        if self.cycle is not None:
            self.cycle.disconnected = True
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(self.limits.write, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stalled = _stop(self._stalled)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head, self._stalled = _stop(self._head), _stop(self._stalled)
        super().connection_lost(exc)


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def impatient(limits: Limits) -> type[Connection]:
    """uvicorn makes connections from a class: one for these limits."""
    return type("Connection", (Connection,), {"limits": limits})
