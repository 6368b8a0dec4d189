"""A bundle at work: prefill, cached decoding, generation."""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import onnxruntime as ort

from exporter.errors import UsageError
from exporter.graph.bundle import Bundle
from exporter.graph.components import LOGITS_TO_KEEP
from exporter.runtime.adapters import NO_ADAPTER, read_adapter
from exporter.runtime.cache import CacheShape, KeyValueCache
from exporter.runtime.sampling import GREEDY, Sampling, generators, next_token

# Tokens of a prompt that one call computes: bounds the logits, (512, 50257) float32 = 103 MB.
CHUNK = 512
SMALLEST_CHUNK = 2
ATTENTION_BLOCK = 64  # onnxruntime takes 2 * head size queries at once, fewer where the cache of a core is small
FIRST_CAPACITY = 128
Reason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token of row `row`; `reason` says why it was the row's last: a stop token, or no room for more."""

    row: int
    id: int
    reason: Reason | None


def next_chunk(remaining: int, chunk: int, block: int) -> int:
    """How many of a prompt's `remaining` tokens to compute next: about `chunk`, and never so that one is left alone.

    A single token takes other kernels than several, here and in attention, whose CPU kernel takes them in multiples of
    `block`. It then differs in the last bits, and after that int8 activations round otherwise (0.09 in a logit of the
    demo pair). Without such a token the logits are bit for bit the same wherever a prompt is split, which
    tests/serving/test_engine_equality.py shows.
    """
    size = remaining if remaining < chunk + SMALLEST_CHUNK else chunk
    return size - SMALLEST_CHUNK if size % block == 1 < size else size


class Runner:
    """One session. Positions run from 0 to `n_positions` - 1: nothing computes past them."""

    def __init__(
        self,
        session: ort.InferenceSession,
        bundle: Bundle,
        *,
        provider: str,
        n_positions: int,
        vocab_size: int,
        stop_tokens: tuple[int, ...],
    ) -> None:
        self.bundle, self.provider = bundle, provider
        self.n_positions, self.vocab_size, self.stop_tokens = n_positions, vocab_size, stop_tokens
        self._session, self._adapter = session, NO_ADAPTER
        keys = [value for value in session.get_inputs() if value.name.endswith(".key")]
        dtype = np.float16 if keys[0].type == "tensor(float16)" else np.float32
        self._cache_shape = CacheShape(len(keys), keys[0].shape[1], keys[0].shape[3], dtype, provider)

    @property
    def adapter(self) -> str | None:
        """The name of the adapter that takes part, None for the base alone."""
        return self._adapter.name

    def with_adapter(self, name: str | None) -> Self:
        """A Runner over the same session with another adapter of the bundle, or with none. Caches stay with theirs.

        Raises UsageError (no such adapter), InputRefused (its file was changed).
        """
        other = copy.copy(self)
        other._adapter = read_adapter(self.bundle, name, self._session, self.provider)
        return other

    def new_cache(self, rows: int, capacity: int = FIRST_CAPACITY) -> KeyValueCache:
        """An empty cache; it grows when a row needs more than `capacity` slots. UsageError for fewer than one row."""
        if rows < 1:
            raise UsageError(f"a batch of {rows} rows", expected="at least one")
        return KeyValueCache(self._cache_shape, rows, max(1, min(capacity, self.n_positions)), self.adapter)

    def cache_bytes(self, rows: int, capacity: int) -> int:
        """What a cache of `rows` rows with `capacity` slots each takes."""
        return self._cache_shape.nbytes(rows, capacity)

    def next_chunk(self, remaining: int, chunk: int) -> int:
        """`next_chunk` for this model's attention."""
        return next_chunk(remaining, chunk, math.gcd(ATTENTION_BLOCK, 2 * self._cache_shape.head_size))

    def logits(self, token_ids: Sequence[int], *, chunk: int = CHUNK) -> np.ndarray:
        """float32 (T, V): the logits after each of the T tokens. UsageError unless 1 <= T <= n_positions."""
        cache = self.new_cache(1, len(token_ids))
        return np.concatenate(list(self._chunks(cache, 0, token_ids, chunk, keep=len(token_ids))))

    def prefill(self, cache: KeyValueCache, row: int, token_ids: Sequence[int], *, chunk: int = CHUNK) -> np.ndarray:
        """Append tokens to a row of the cache; float32 (V,), the logits after the last one."""
        last = np.empty(0, np.float32)
        for logits in self._chunks(cache, row, token_ids, chunk, keep=1):
            last = logits[-1]
        return last

    def _chunks(
        self, cache: KeyValueCache, row: int, token_ids: Sequence[int], chunk: int, *, keep: int
    ) -> Iterator[np.ndarray]:
        """The last `keep` logits of each chunk. A row is computed alone: unequal prompts need no padding at all."""
        if chunk < 1:
            raise UsageError(f"chunk {chunk}", expected="1 or more")
        ids = self._checked(token_ids)
        self._require_own(cache)
        if not 0 <= row < cache.rows:
            raise UsageError(f"row {row}", expected=f"a row of the cache, 0 to {cache.rows - 1}")
        self._require_room(int(cache.lengths[row]) + len(ids))
        start = 0
        while start < len(ids):
            stop = start + self.next_chunk(len(ids) - start, chunk)
            yield self.append(cache, row, ids[None, start:stop], keep)[0]
            start = stop

    def append(self, cache: KeyValueCache, first: int, token_ids: np.ndarray, keep: int = 1) -> np.ndarray:
        """Append tokens (B, S) to B neighbouring rows from `first` on: one row, or S = 1 where rows differ in length.

        float32 (B, min(keep, S), V): the logits after the last ones. Raises UsageError (no room).
        """
        count, new = token_ids.shape
        past = cache.lengths[first : first + count]  # (B,)
        if count > 1 and new > 1:
            raise UsageError(f"{new} tokens for each of {count} rows", expected="one row, or one token a row")
        total = int(past.max()) + new
        self._require_room(total)
        cache.reserve(min(self.n_positions, total))
        positions = past[:, None] + np.arange(new)  # (B, S)
        mask = (np.arange(total) <= positions[:, -1:]).astype(np.int64)  # (B, total): a row's own slots
        logits = self._run(cache, first, token_ids, positions, mask, min(keep, new))
        cache.lengths[first : first + count] += new
        return logits

    def decode(
        self, cache: KeyValueCache, token_ids: Sequence[int], active: Sequence[bool] | None = None
    ) -> np.ndarray:
        """Append one token to every row (rows may differ in length); float32 (B, V).

        A row that is not `active` is computed too, but not kept: its token is arbitrary, its length stays.
        """
        ids = self._checked(token_ids)
        self._require_own(cache)
        keep = np.ones(cache.rows, bool) if active is None else np.asarray(active, bool)
        if ids.shape != (cache.rows,) or keep.shape != (cache.rows,):
            raise UsageError(f"{len(ids)} tokens for {cache.rows} rows", expected="one token a row")
        self._require_room(int(cache.lengths[keep].max(initial=0)) + 1)
        # An idle row that is full writes over its last slot: nobody reads it again.
        slots = np.minimum(cache.lengths, self.n_positions - 1)
        total = int(slots.max()) + 1
        cache.reserve(total)
        mask = (np.arange(total)[None] <= slots[:, None]).astype(np.int64)  # (B, total): a row's own slots
        logits = self._run(cache, 0, ids[:, None], slots[:, None], mask, 1)
        cache.lengths[keep] += 1
        return logits[:, 0]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        *,
        stop_tokens: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """The new tokens of each prompt, a stop token included. `stop_tokens` default to the model's own."""
        rows: list[list[int]] = [[] for _ in prompts]
        for token in self.stream(prompts, max_new_tokens, sampling, stop_tokens=stop_tokens):
            rows[token.row].append(token.id)
        return rows

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        *,
        stop_tokens: Sequence[int] | None = None,
    ) -> Iterator[Token]:
        """Tokens as they come, row by row. A row ends at a stop token, at `max_new_tokens`, or at `n_positions`."""
        if max_new_tokens < 1 or not prompts:
            raise UsageError(f"{len(prompts)} prompts, {max_new_tokens} new tokens", expected="at least one of each")
        stops = frozenset(self.stop_tokens if stop_tokens is None else stop_tokens)
        context = [self._checked(prompt).tolist() for prompt in prompts]
        longest = max(map(len, context))
        self._require_room(longest)
        limits = [min(len(row) + max_new_tokens, self.n_positions + 1) for row in context]
        cache = self.new_cache(len(prompts), longest + min(max_new_tokens, FIRST_CAPACITY))
        random = generators(sampling, len(prompts))
        logits = np.stack([self.prefill(cache, row, ids) for row, ids in enumerate(context)])
        active = [True] * len(prompts)
        while True:
            for row in [row for row, going in enumerate(active) if going]:
                chosen = next_token(logits[row], context[row], sampling, random[row], len(prompts[row]))
                context[row].append(chosen)
                full = len(context[row]) >= limits[row]
                reason: Reason | None = "stop" if chosen in stops else "length" if full else None
                active[row] = reason is None
                yield Token(row, chosen, reason)
            if not any(active):
                return
            logits = self.decode(cache, [row[-1] for row in context], active)

    def _checked(self, token_ids: Sequence[int]) -> np.ndarray:
        ids = np.asarray(token_ids, np.int64)
        if ids.ndim != 1 or ids.size == 0:
            raise UsageError("no tokens", expected="a prompt of at least one token")
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise UsageError(
                f"token {int(ids.max() if ids.max() >= self.vocab_size else ids.min())}",
                expected=f"ids from 0 to {self.vocab_size - 1}",
                todo="use the bundle's own tokenizer",
            )
        return ids

    def _require_room(self, length: int) -> None:
        if length > self.n_positions:
            raise UsageError(
                f"{length} tokens", expected=f"at most {self.n_positions} (n_positions)", todo="shorten the prompt"
            )

    def _require_own(self, cache: KeyValueCache) -> None:
        for made_with in set(cache.adapters) - {self.adapter}:
            raise UsageError(
                f"a cache made with the adapter {made_with}", expected=f"one made with the adapter {self.adapter}"
            )

    def _run(
        self, cache: KeyValueCache, row: int, ids: np.ndarray, positions: np.ndarray, mask: np.ndarray, keep: int
    ) -> np.ndarray:
        """One call over len(ids) rows from `row` on; float32 (B, keep, V). Writes the cache in place."""
        binding = cache.binding(self._session, row, len(ids), self._adapter)
        feeds = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
        for name, array in feeds.items():
            feeds[name] = np.ascontiguousarray(array)
            binding.bind_cpu_input(name, feeds[name])
        # An optional input: onnxruntime's bind_cpu_input does not know its name. The array must outlive the run.
        kept = ort.OrtValue.ortvalue_from_numpy(np.array([keep]))
        binding.bind_ortvalue_input(LOGITS_TO_KEEP, kept)
        logits = np.empty((len(ids), keep, self.vocab_size), np.float32)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self._session.run_with_iobinding(binding)
        return logits
