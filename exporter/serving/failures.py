"""OpenAI's error bodies: what went wrong, as a status code and one JSON object."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from exporter.errors import ExporterError, InputRefused, UsageError
from exporter.serving.requests import EngineClosed, OutOfMemory, QueueFull

LONGEST_NAME = 100  # characters of what a client sent that a message repeats


@dataclass(eq=False)
class Failure(Exception):
    """A response that is no answer. `param`: the body's field that is wrong. `code`: a word for programs."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def type(self) -> str:
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, dict(self.headers))


def shutting_down() -> Failure:
    return Failure(503, "the server is shutting down", "shutting_down", headers={"Retry-After": "5"})


def failure_of(error: ExporterError) -> Failure:
    """What a client is told. The engine's UsageError is the request's fault, anything else but a full queue ours."""
    message = "; expected: ".join(part for part in (error.seen, error.expected) if part)
    match error:
        case QueueFull():
            seconds = max(1, round(error.retry_after))
            return Failure(429, message, "queue_full", headers={"Retry-After": str(seconds)})
        case EngineClosed():
            return shutting_down()
        case OutOfMemory():
            return Failure(503, message, "out_of_memory", headers={"Retry-After": "5"})
        case UsageError() | InputRefused():
            return Failure(400, message)
        case _:
            return Failure(500, message, "computation_failed")


def wrong_body(error: ValidationError, expectations: Mapping[str, str]) -> Failure:
    """The first thing that pydantic found. `expectations`: for each field of the body, what it has to be."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = first["loc"]
    name = str(path[0])[:LONGEST_NAME] if path else None
    match first["type"]:
        case "json_invalid":
            return Failure(
                400, f"the body is not valid JSON: {first['msg'].removeprefix('Invalid JSON: ')}", "bad_json"
            )
        case "extra_forbidden":
            return Failure(400, f"unrecognized request argument: {dotted(path)}", "unknown_parameter", name)
        case "missing":
            return Failure(400, f"missing required parameter: {dotted(path)}", "missing_required_parameter", name)
        case "none_required":
            return Failure(400, f"{name} is not supported by this server", "unsupported_parameter", name)
    if name is None:
        return Failure(400, "the body is not a JSON object", "bad_json")
    if len(path) == 1 or name not in ("messages", "stream_options"):
        return Failure(400, f"{name} has to be {expectations.get(name, 'something else')}", "invalid_value", name)
    return Failure(400, f"{dotted(path)}: {first['msg']}", "invalid_value", name)


def dotted(path: Sequence[int | str]) -> str:
    return ".".join(str(part) for part in path)[:LONGEST_NAME]
