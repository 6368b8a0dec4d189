"""Around every request: a log line, a figure, an id, and a last net for what nobody expected."""

import time
import uuid
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from exporter.serving.failures import Failure
from exporter.serving.logs import Level
from exporter.serving.metrics import Facts
from exporter.serving.service import Service

GONE = 499  # nginx's number: the client closed the connection


class Observe:
    """ASGI middleware. Requests count as in flight from their first byte on until their last one is written."""

    def __init__(self, app: ASGIApp, service: Service, paths: frozenset[str]) -> None:
        self._app, self._service, self._paths = app, service, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        facts, name, status, finished = Facts(), uuid.uuid4().hex, GONE, False
        scope.setdefault("state", {})["facts"] = facts

        async def observed(message: Message) -> None:
            nonlocal status, finished
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = name
            finished = message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        self._service.in_flight += 1
        try:
            await self._app(scope, receive, observed)
        except ClientDisconnect:
            pass
        except Exception as error:
            facts.error, facts.failed = "internal_error", 500
            self._service.log.defect(error, id=name)
            if status == GONE:
                failure = Failure(500, f"an internal error; its id in the log is {name}", "internal_error")
                await failure.response()(scope, receive, observed)
        finally:
            self._service.in_flight -= 1
            self._record(scope, name, facts, status if finished else GONE)

    def _record(self, scope: Scope, name: str, facts: Facts, status: int) -> None:
        path = scope["path"] if scope["path"] in self._paths else "other"
        seconds = time.monotonic() - facts.began
        metrics = self._service.metrics
        metrics.requests.labels(path, str(status)).inc()
        metrics.seconds.labels(path).observe(seconds)
        if facts.error is not None:
            metrics.errors.labels(facts.error).inc()
        self._service.log.write(
            _level(status, facts),
            "request",
            id=name,
            client=scope["client"][0] if scope.get("client") else None,
            method=scope["method"],
            path=scope["path"][:200],
            status=status,
            ms=round(1000 * seconds, 1),
            **_of_generation(facts),
            error=facts.error,
        )


def _level(status: int, facts: Facts) -> Level:
    """A failure in the middle of a stream counts as what its own status says, not as the stream's 200.

    503 is no error of the server's: it ends, or time or memory is over.
    """
    worst = facts.failed or status
    if worst >= 500 and worst != 503:
        return "error"
    return "info" if facts.failed is None else "warning"


def _of_generation(facts: Facts) -> dict[str, Any]:
    if facts.model is None:
        return {}
    return {
        "model": facts.model,
        "stream": facts.stream,
        "choices": facts.choices,
        "prompt_tokens": facts.prompt_tokens,
        "cached_tokens": facts.cached_tokens,
        "new_tokens": facts.new_tokens,
        "first_token_ms": facts.first_token_ms,
        "finish_reasons": facts.finish_reasons,
        "prompts": facts.prompts,
    }
