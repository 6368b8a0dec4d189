"""What goes into the engine and what comes out: requests, streams of steps, figures. No session, no HTTP."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from exporter.errors import EnvironmentLacking
from exporter.runtime.sampling import GREEDY, Sampling

Reason = Literal["stop", "length", "deadline", "cancelled", "shutdown"]


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to continue. `max_new_tokens` 0 computes the prompt's log-probabilities alone.

    `stop_tokens` None: the model's own. `top_logprobs` None: no log-probabilities; n: a token's own and the n best.
    `echo_logprobs`: the prompt tokens' too. `deadline`: time.monotonic() at which the stream ends, wherever it is.
    `client`: requests of one client and adapter stand in one line; the lines take turns.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    adapter: str | None = None
    stop_tokens: tuple[int, ...] | None = None
    top_logprobs: int | None = None
    echo_logprobs: bool = False
    deadline: float | None = None
    client: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """One token of a stream. The last step has the `reason`, a stop token included among the tokens.

    `id` is None where a stream ended between two tokens (deadline, cancelled, shutdown, or no tokens asked for): such
    a step is always the last one. `logprob` and `top` (best first) are natural logarithms of the model's own
    probabilities, before penalties and temperature.
    """

    id: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    reason: Reason | None = None


class Stream(Protocol):
    """Steps as they come, to be read in the event loop in which it was submitted. Iteration raises an ExporterError
    when the computation failed; every other end is a last step with a reason.
    """

    def __aiter__(self) -> AsyncIterator[Step]: ...

    @property
    def prompt_logprobs(self) -> tuple[Step, ...] | None:
        """With `echo_logprobs`, from the first step on: one for each prompt token, the first one without logprob."""
        ...

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were not computed because another request had: known from the first step on."""
        ...

    def cancel(self) -> None:
        """End at the next step with the reason cancelled. Harmless at any time, from any thread."""
        ...


class QueueFull(EnvironmentLacking):
    """The queue has no place for another request; one is likely after `retry_after` seconds."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(f"{waiting} requests are waiting", todo=f"try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class EngineClosed(EnvironmentLacking):
    """The engine drains or has stopped: it takes no requests any more."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down", todo="try again later, or another server")


class OutOfMemory(EnvironmentLacking):
    """A stream ended because there was no memory for it."""

    def __init__(self) -> None:
        super().__init__("the server is out of memory", todo="try again later, or with less")


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A moment's figures, and totals since the start."""

    waiting: int  # requests in the queue
    running: int  # slots that hold a running stream
    slots: int
    cache_bytes: int  # of the whole key-value cache, allocated once
    capacity: int  # positions that a slot has room for
    cached_prefixes: int  # free slots whose tokens can be reused
    requests: int  # accepted
    rejected: int  # QueueFull
    failed: int  # streams that ended with an error
    finished: Mapping[Reason, int]
    prompt_tokens: int  # of admitted requests
    reused_tokens: int  # of these, taken from a cached prefix
    new_tokens: int
    decode_steps: int
    decode_rows: int  # summed over the steps: decode_rows / decode_steps is the mean batch
    decode_seconds: float
    prefill_seconds: float


class Engine(Protocol):
    """One session, many streams. `submit` and `stats` return at once: computing is the worker's."""

    @property
    def n_positions(self) -> int:
        """Prompt and new tokens together never exceed this by more than one."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def stop_tokens(self) -> tuple[int, ...]: ...

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names that `Request.adapter` may have beside None."""
        ...

    @property
    def alive(self) -> bool:
        """The worker runs. While it drains it takes no requests."""
        ...

    def submit(self, request: Request) -> Stream:
        """Call it in a running event loop. Raises UsageError (a bad request), QueueFull, EngineClosed."""
        ...

    def stats(self) -> EngineStats: ...

    def start(self) -> None:
        """Start the worker thread."""
        ...

    def drain(self, timeout: float) -> bool:
        """Refuse new requests and wait until every accepted stream has ended; False if `timeout` seconds were not
        enough. Blocks: call it through asyncio.to_thread.
        """
        ...

    def stop(self) -> None:
        """End every stream with the reason shutdown and join the worker. Blocks for at most about one step."""
        ...
