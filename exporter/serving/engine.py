"""Continuous batching: one worker thread owns the session; streams join and leave between its steps."""

import logging
import threading
import time

from exporter.errors import EnvironmentLacking, UsageError
from exporter.files import human_bytes
from exporter.runtime.adapters import adapter_names
from exporter.runtime.memory import free_memory
from exporter.runtime.runner import Runner
from exporter.serving.batch import Batch, Report
from exporter.serving.requests import EngineClosed, EngineStats, QueueFull, Reason, Request, Step
from exporter.serving.scheduler import Lines
from exporter.serving.streams import EngineStream, Event, deliver

log = logging.getLogger(__name__)
OF_FREE_MEMORY = 0.5  # that the cache may take where nothing else is said
ALONE = 4  # times `stall`: how long prompts are computed at once while no stream is waiting for its next token


def log_defect(error: BaseException) -> None:
    log.error("a defect", exc_info=error)


class BatchingEngine:
    """`requests.Engine` over a Runner and its bundle's adapters.

    slots: streams computed at once, as many as fit into `cache_bytes`, half of the free memory by default. capacity:
    positions of a slot, n_positions by default. queue: streams that may wait. stall: seconds by which prompts may hold
    up the running streams' next token. on_defect: told, in the worker's thread, of every exception that nobody foresaw.
    Raises UsageError (also for `cache_bytes` below one slot), EnvironmentLacking (no memory for one slot).
    """

    def __init__(
        self,
        runner: Runner,
        *,
        slots: int = 16,
        cache_bytes: int | None = None,
        capacity: int | None = None,
        queue: int = 64,
        stall: float = 0.1,
        on_defect: Report = log_defect,
    ) -> None:
        capacity = runner.n_positions if capacity is None else capacity
        if slots < 1 or queue < 1 or not 1 <= capacity <= runner.n_positions or not stall > 0:
            raise UsageError(
                f"{slots} slots of {capacity} positions, a queue of {queue}, a stall of {stall} s",
                expected=f"at least one slot and place in the queue, 1 to {runner.n_positions} positions, some time",
            )
        available = int(OF_FREE_MEMORY * free_memory(runner.provider)) if cache_bytes is None else cache_bytes
        one = runner.cache_bytes(1, capacity)
        rows = min(slots, available // one)
        if rows < 1:
            seen = f"a slot of {capacity} positions takes {human_bytes(one)}, and {human_bytes(available)} are for them"
            if cache_bytes is not None:
                raise UsageError(seen, expected=f"at least {one} bytes", todo="give the cache more memory")
            raise EnvironmentLacking(seen, todo="free memory: half of what is free is for the cache")
        base = runner.with_adapter(None) if runner.adapter is not None else runner
        self._runner, self._capacity, self._queue, self._stall = base, capacity, queue, stall
        self.adapters = adapter_names(runner.bundle)
        runners = {None: base} | {name: base.with_adapter(name) for name in self.adapters}
        self._batch = Batch(runners, rows, capacity, self._emit, on_defect)
        self._cache_bytes, self._on_defect = runner.cache_bytes(rows, capacity), on_defect
        self._events: list[tuple[EngineStream, Event]] = []
        self._thread = threading.Thread(target=self._work, name="exporter-engine", daemon=True)
        # Guards what both sides touch: the lines, the three flags, the two counts.
        self._condition = threading.Condition()
        self._lines: Lines[EngineStream] = Lines()
        self._closed = self._stopping = False
        self._busy = False
        self._accepted = self._rejected = 0

    @property
    def n_positions(self) -> int:
        return self._runner.n_positions

    @property
    def vocab_size(self) -> int:
        return self._runner.vocab_size

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        return self._runner.stop_tokens

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    def submit(self, request: Request) -> EngineStream:
        self._check(request)
        stream = EngineStream(request, self._wake)
        with self._condition:
            if self._closed:
                raise EngineClosed
            if len(self._lines) >= self._queue:
                self._rejected += 1
                raise QueueFull(len(self._lines), self._retry_after())
            self._lines.put((request.adapter, request.client), stream)
            self._accepted += 1
            self._condition.notify_all()
        return stream

    def _check(self, request: Request) -> None:
        vocabulary, prompt = self._runner.vocab_size, request.prompt
        if not prompt or min(prompt) < 0 or max(prompt) >= vocabulary:
            raise UsageError("a prompt without tokens or with unknown ones", expected=f"ids from 0 to {vocabulary - 1}")
        if len(prompt) > self._capacity:
            raise UsageError(f"{len(prompt)} tokens", expected=f"at most {self._capacity}", todo="shorten the prompt")
        if request.max_new_tokens < (0 if request.echo_logprobs else 1):
            raise UsageError(f"{request.max_new_tokens} new tokens", expected="at least one")
        if request.top_logprobs is not None and request.top_logprobs < 0:
            raise UsageError(f"{request.top_logprobs} log-probabilities", expected="0 or more")
        if request.adapter is not None and request.adapter not in self.adapters:
            raise UsageError(f"the adapter {request.adapter!r}", expected="one of " + ", ".join(self.adapters))

    def _retry_after(self) -> float:
        """Until a place in the queue is free, if streams go on to take as long as the last ones."""
        return max(1.0, self._batch.mean_seconds / len(self._batch.slots))

    def stats(self) -> EngineStats:
        batch, totals = self._batch, self._batch.totals
        with self._condition:
            waiting, accepted, rejected = len(self._lines), self._accepted, self._rejected
        return EngineStats(
            waiting=waiting,
            running=sum(slot.taken for slot in batch.slots),
            slots=len(batch.slots),
            cache_bytes=self._cache_bytes,
            capacity=self._capacity,
            cached_prefixes=sum(bool(slot.tokens) and not slot.taken for slot in batch.slots),
            requests=accepted,
            rejected=rejected,
            failed=totals.failed,
            finished=dict(batch.finished),
            prompt_tokens=totals.prompt_tokens,
            reused_tokens=totals.reused_tokens,
            new_tokens=totals.new_tokens,
            decode_steps=totals.decode_steps,
            decode_rows=totals.decode_rows,
            decode_seconds=totals.decode_seconds,
            prefill_seconds=totals.prefill_seconds,
        )

    def start(self) -> None:
        self._thread.start()

    def drain(self, timeout: float) -> bool:
        with self._condition:
            self._closed = True
            return self._condition.wait_for(lambda: not self._lines and not self._busy, timeout)

    def stop(self) -> None:
        with self._condition:
            self._closed = self._stopping = True
            self._condition.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        else:
            self._end_all()

    def _wake(self) -> None:
        with self._condition:
            self._condition.notify_all()

    def _emit(self, stream: EngineStream, event: Event) -> None:
        self._events.append((stream, event))

    def _flush(self) -> None:
        events, self._events = self._events, []
        deliver(events)

    def _work(self) -> None:
        try:
            while self._next_round():
                self._compute()
        except BaseException as error:
            self._on_defect(error)
        finally:  # nobody waits for a worker that has gone, whatever made it go
            with self._condition:
                self._closed = True
            self._end_all()

    def _compute(self) -> None:
        try:
            if self._batch.prefilling:
                self._batch.prefill(self._stall if self._batch.decoding else ALONE * self._stall)
                self._flush()
            if self._batch.decoding:
                self._batch.decode()
        except Exception as error:  # a defect outside any stream's own work: it may have touched all that run
            self._batch.abandon(error)
        self._flush()

    def _next_round(self) -> bool:
        """Wait for work; let streams out whose time is over, and others into their slots. False: the end."""
        with self._condition:
            while True:
                self._let_out()
                while self._lines and self._batch.has_room:
                    self._batch.admit(self._lines.take())
                self._busy = bool(self._batch.running)
                if not self._busy:
                    self._condition.notify_all()  # for drain
                if self._events or self._busy or self._stopping:
                    break
                self._condition.wait()
        self._flush()
        return not self._stopping

    def _let_out(self) -> None:
        now = time.monotonic()
        for stream in self._lines.remove(lambda one: _over(one, now) is not None):
            reason: Reason = "cancelled" if stream.cancelled else "deadline"
            self._batch.finished[reason] += 1
            self._emit(stream, Step(None, reason=reason))
        for active in list(self._batch.running.values()):
            if (why := _over(active.stream, now)) is not None:
                self._batch.end(active, Step(None, reason=why))

    def _end_all(self) -> None:
        last = Step(None, reason="shutdown")
        with self._condition:
            waiting = self._lines.remove(lambda one: True)
        for stream in waiting:
            self._batch.finished["shutdown"] += 1
            self._emit(stream, last)
        for active in list(self._batch.running.values()):
            self._batch.end(active, last)
        self._flush()
        with self._condition:
            self._busy = False
            self._condition.notify_all()


def _over(stream: EngineStream, now: float) -> Reason | None:
    """Why a stream ends before its next token, if it does."""
    if stream.cancelled:
        return "cancelled"
    deadline = stream.request.deadline
    return "deadline" if deadline is not None and now >= deadline else None
