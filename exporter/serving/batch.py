"""The running streams, one row of the cache each: prompts computed a chunk at a time, then a token a step together."""

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from exporter.errors import EnvironmentLacking, ExporterError
from exporter.runtime.logprobs import logprobs
from exporter.runtime.runner import SMALLEST_CHUNK, Runner
from exporter.runtime.sampling import generators, next_token, require_finite
from exporter.serving.requests import OutOfMemory, Reason, Request, Step
from exporter.serving.scheduler import LEAST_CHUNK, ChunkSize
from exporter.serving.slots import Slot, longest_head, slot_for, swaps
from exporter.serving.streams import EngineStream, Event

Emit = Callable[[EngineStream, Event], object]
Report = Callable[[BaseException], object]  # of a defect: an exception that is no ExporterError


@dataclass(slots=True, eq=False)
class Active:
    """A running stream. `tokens`: prompt and answer; the last one's keys and values are not in the cache yet."""

    stream: EngineStream
    request: Request
    row: int
    tokens: list[int]
    limit: int  # of len(tokens)
    stops: frozenset[int]
    random: np.random.Generator
    since: float
    echoed: list[Step] = field(default_factory=list)
    decoding: bool = False


@dataclass(slots=True)
class Totals:
    """Since the start; what EngineStats names so, and `ended`: streams that have left a slot."""

    failed: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    decode_steps: int = 0
    decode_rows: int = 0
    decode_seconds: float = 0.0
    prefill_seconds: float = 0.0
    ended: int = 0


class Batch:
    """Belongs to one thread. A row holds its stream's keys and values; a free one those of `slots[row].tokens`."""

    def __init__(
        self, runners: Mapping[str | None, Runner], rows: int, capacity: int, emit: Emit, report: Report
    ) -> None:
        self._runners, self._capacity, self._emit, self._report = runners, capacity, emit, report
        self._ranks = {adapter: rank for rank, adapter in enumerate(runners)}
        self._cache = runners[None].new_cache(rows, capacity)
        self.slots = [Slot() for _ in range(rows)]
        self.running: dict[int, Active] = {}  # by row
        self._prefilling: deque[Active] = deque()
        self._chunk = ChunkSize()
        self.totals = Totals()
        self.finished: Counter[Reason] = Counter()
        self.mean_seconds = 0.0  # of a stream in its slot, the recent ones weighing more

    @property
    def has_room(self) -> bool:
        return len(self.running) < len(self.slots)

    def admit(self, stream: EngineStream) -> None:
        """Give a stream one of the free slots. One that cannot get it ends with an error."""
        try:
            self._place(stream)
        except Exception as error:
            self.totals.failed += 1
            self._emit(stream, self._told(error))

    def _place(self, stream: EngineStream) -> None:
        """All that may fail comes before the first change: a slot is taken as a whole or not at all."""
        request = stream.request
        row = slot_for(self.slots, request.adapter, request.prompt)
        slot, runner = self.slots[row], self._runners[request.adapter]
        own = longest_head([slot], request.adapter, request.prompt)[1]
        kept = 0 if request.echo_logprobs else max(0, min(own, len(request.prompt) - SMALLEST_CHUNK))
        head = list(request.prompt[:kept])
        stops = runner.stop_tokens if request.stop_tokens is None else request.stop_tokens
        active = Active(
            stream,
            request,
            row,
            list(request.prompt),
            min(len(request.prompt) + request.max_new_tokens, self._capacity + 1),
            frozenset(stops),
            generators(request.sampling, 1)[0],
            time.monotonic(),
        )
        slot.taken, slot.adapter, slot.tokens = True, request.adapter, head
        self._cache.adapters[row], self._cache.lengths[row] = request.adapter, kept
        stream.cached_tokens = kept
        self.running[row] = active
        self._prefilling.append(active)
        self.totals.prompt_tokens += len(request.prompt)
        self.totals.reused_tokens += kept

    @property
    def prefilling(self) -> bool:
        return bool(self._prefilling)

    @property
    def decoding(self) -> bool:
        return any(active.decoding for active in self.running.values())

    def end(self, active: Active, event: Event) -> None:
        """The last event of a stream; its slot is free from now on."""
        if isinstance(event, Step):
            assert event.reason is not None
            self.finished[event.reason] += 1
        else:
            self.totals.failed += 1
        slot = self.slots[active.row]
        slot.taken, slot.used = False, self.totals.ended
        self._cache.lengths[active.row] = len(slot.tokens)
        self.totals.ended += 1
        del self.running[active.row]
        if active in self._prefilling:
            self._prefilling.remove(active)
        took = time.monotonic() - active.since
        self.mean_seconds = (0.8 * self.mean_seconds + 0.2 * took) if self.mean_seconds else took
        self._emit(active.stream, event)

    def prefill(self, seconds: float) -> None:
        """Compute prompts, a chunk of each in turn, for about so long; one chunk at least."""
        until = time.monotonic() + seconds
        while self._prefilling:
            active = self._prefilling.popleft()
            self._prefilling.append(active)
            began = time.monotonic()
            try:
                tokens = self._prefill_chunk(active, self._chunk.within(until - began))
            except Exception as error:
                self._fail([active], error)
            else:
                self._chunk.took(tokens, time.monotonic() - began)
            self.totals.prefill_seconds += time.monotonic() - began
            if self._chunk.within(until - time.monotonic()) <= LEAST_CHUNK:
                return

    def _prefill_chunk(self, active: Active, chunk: int) -> int:
        """How many tokens were computed. Whatever it raises is about this stream alone."""
        self._take_from_neighbours(active)
        row, prompt, slot = active.row, active.request.prompt, self.slots[active.row]
        start = int(self._cache.lengths[row])
        stop = start + self._runners[active.request.adapter].next_chunk(len(prompt) - start, chunk)
        keep = stop - start if active.request.echo_logprobs else 1
        logits = self._append([active], row, np.array([prompt[start:stop]]), keep)
        if stop - start >= SMALLEST_CHUNK:
            slot.tokens.extend(prompt[start:stop])
        if active.request.echo_logprobs:
            self._echo(active, start, stop, logits[0])
        if stop == len(prompt):
            self._prefilling.remove(active)
            active.decoding = True
            active.stream.prompt_logprobs = tuple(active.echoed) if active.request.echo_logprobs else None
            if active.request.max_new_tokens == 0:
                self.end(active, Step(None, reason="length"))
            else:
                self._advance(active, logits[0, -1])
        return stop - start

    def _take_from_neighbours(self, active: Active) -> None:
        """Copy what another row has already computed of this prompt, but for its last tokens: they give the logits."""
        if active.request.echo_logprobs:
            return
        have, row = int(self._cache.lengths[active.row]), active.row
        source, head = longest_head(self.slots, active.request.adapter, active.request.prompt)
        head = min(head, len(active.request.prompt) - SMALLEST_CHUNK)
        if head <= have or source == row:
            return
        self._cache.copy_slots(source, row, have, head)
        self.slots[row].tokens.extend(active.request.prompt[have:head])
        active.stream.cached_tokens += head - have
        self.totals.reused_tokens += head - have

    def _echo(self, active: Active, start: int, stop: int, logits: np.ndarray) -> None:
        """The log-probabilities of the tokens behind positions start to stop. ParityFailed for logits not finite."""
        require_finite(logits)
        prompt, top = active.request.prompt, active.request.top_logprobs or 0
        if start == 0:
            active.echoed.append(Step(prompt[0]))
        for position in range(start, min(stop, len(prompt) - 1)):
            token = prompt[position + 1]
            active.echoed.append(Step(token, *logprobs(logits[position - start], token, top)))

    def decode(self) -> None:
        """One token for every stream whose prompt has been computed; the streams of an adapter in one call."""
        self._arrange()
        began = time.monotonic()
        groups: dict[str | None, list[Active]] = {}
        for row in sorted(self.running):
            if (active := self.running[row]).decoding:
                groups.setdefault(active.request.adapter, []).append(active)
        for actives in groups.values():
            last = np.array([[active.tokens[-1]] for active in actives])  # (B, 1)
            try:
                logits = self._append(actives, actives[0].row, last, 1)
            except Exception as error:
                self._fail(actives, error)
                continue
            for active, its in zip(actives, logits[:, -1], strict=True):
                self._advance(active, its)
            self.totals.decode_steps += 1
            self.totals.decode_rows += len(actives)
        self.totals.decode_seconds += time.monotonic() - began

    def _arrange(self) -> None:
        """Streams that decode with one adapter stand in neighbouring rows: a call computes no idle row."""
        ranks = [len(self._ranks)] * len(self.slots)
        for row, active in self.running.items():
            if active.decoding:
                ranks[row] = self._ranks[active.request.adapter]
        for a, b in swaps(ranks):
            self._cache.swap_rows(a, b)
            self.slots[a], self.slots[b] = self.slots[b], self.slots[a]
            moved = {b: self.running.pop(a, None), a: self.running.pop(b, None)}
            for row, active in moved.items():
                if active is not None:
                    self.running[row], active.row = active, row

    def _append(self, actives: list[Active], first: int, ids: np.ndarray, keep: int) -> np.ndarray:
        """Logits (B, keep, V). Raises ExporterError, MemoryError."""
        try:
            return self._runners[actives[0].request.adapter].append(self._cache, first, ids, keep)
        except (ExporterError, MemoryError):
            raise
        except Exception as error:  # onnxruntime's own exceptions have no common base
            self._report(error)
            raise EnvironmentLacking(f"ONNX Runtime failed: {str(error)[:300]}", todo="try again") from error

    def _fail(self, actives: list[Active], error: Exception) -> None:
        """End streams with an error; what their rows hold is not reused."""
        told = self._told(error)
        for active in actives:
            self.slots[active.row].tokens = []
            self._cache.clear_row(active.row)
            self.end(active, told)

    def _told(self, error: Exception) -> ExporterError:
        """What a stream is told of an error; where that is not all, the error itself is reported."""
        if isinstance(error, ExporterError):
            return error
        self._report(error)
        if isinstance(error, MemoryError):
            return OutOfMemory()
        return EnvironmentLacking(f"an internal error: {type(error).__name__}", todo="try again")

    def abandon(self, error: Exception) -> None:
        """The last net: end every running stream with an error, and forget what the cache holds."""
        self._fail(list(self.running.values()), error)
        for row, slot in enumerate(self.slots):
            slot.tokens = []
            self._cache.clear_row(row)

    def _advance(self, active: Active, logits: np.ndarray) -> None:
        """The next token from logits (V,). What fails here ends this stream, and not those of the same step."""
        try:
            step = self._choose(active, logits)
        except Exception as error:
            self._fail([active], error)
            return
        if step.reason is None:
            self._emit(active.stream, step)
        else:
            self.end(active, step)

    def _choose(self, active: Active, logits: np.ndarray) -> Step:
        request = active.request
        token = next_token(logits, active.tokens, request.sampling, active.random, len(request.prompt))
        active.tokens.append(token)
        self.totals.new_tokens += 1
        ended: Reason | None = (
            "stop" if token in active.stops else "length" if len(active.tokens) >= active.limit else None
        )
        if request.top_logprobs is None:
            return Step(token, reason=ended)
        return Step(token, *logprobs(logits, token, request.top_logprobs), reason=ended)
