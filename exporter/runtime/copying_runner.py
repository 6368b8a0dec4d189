"""Graphs that concatenate their cache, as optimum writes them: every call copies it, a row at a time."""

from collections.abc import Sequence

import numpy as np
import onnxruntime as ort

from exporter.errors import InputRefused, UsageError
from exporter.runtime.adapters import ActiveAdapter
from exporter.runtime.cache import CacheShape, KeyValueCache
from exporter.runtime.runner import Runner


class CopiedCache(KeyValueCache):
    """A row's keys and values are what the last call returned for it: (1, heads, slots, head size) by input name."""

    def __init__(self, shape: CacheShape, rows: int, names: Sequence[str]) -> None:
        self.shape, self.rows, self.capacity = shape, rows, 0
        self.adapters: list[str | None] = [None] * rows
        self.lengths = np.zeros(rows, np.int64)
        self._empty = dict.fromkeys(names, np.zeros((1, shape.heads, 0, shape.head_size), shape.dtype))
        self.pasts = [self._empty.copy() for _ in range(rows)]

    def reserve(self, capacity: int) -> None:
        pass  # it grows with every call

    def copy_slots(self, source: int, target: int, start: int, stop: int) -> None:
        self.pasts[target] = {name: array[:, :, :stop] for name, array in self.pasts[source].items()}
        self.lengths[target] = stop

    def swap_rows(self, a: int, b: int) -> None:
        self.pasts[a], self.pasts[b] = self.pasts[b], self.pasts[a]
        self.lengths[[a, b]] = self.lengths[[b, a]]

    def clear_row(self, row: int) -> None:
        self.pasts[row], self.lengths[row] = self._empty.copy(), 0

    def filled(self, row: int) -> dict[str, np.ndarray]:
        return {name: array[0, :, : int(self.lengths[row])] for name, array in self.pasts[row].items()}

    def binding(self, session: ort.InferenceSession, first: int, count: int, adapter: ActiveAdapter) -> ort.IOBinding:
        raise NotImplementedError("a copied cache has no buffer")


class CopyingRunner(Runner):
    """Same answers as a Runner, slower: for architectures without a builder of their own."""

    def new_cache(self, rows: int, capacity: int = 0) -> CopiedCache:
        if rows < 1:
            raise UsageError(f"a batch of {rows} rows", expected="at least one")
        return CopiedCache(self._cache_shape, rows, self._past_names())

    def _past_names(self) -> list[str]:
        return [value.name for value in self._session.get_inputs() if value.name.startswith("past_key_values.")]

    def _run(
        self, cache: KeyValueCache, row: int, ids: np.ndarray, positions: np.ndarray, mask: np.ndarray, keep: int
    ) -> np.ndarray:
        """(B, keep, V); the graph computes all positions whatever `keep` says."""
        assert isinstance(cache, CopiedCache)
        rows = [self._run_row(cache.pasts[row + i], ids[i : i + 1], int(positions[i, 0])) for i in range(len(ids))]
        return np.concatenate(rows)[:, -keep:]

    def _run_row(self, past: dict[str, np.ndarray], ids: np.ndarray, length: int) -> np.ndarray:
        """(1, S, V). Slots behind `length` were computed for an idle row and never counted."""
        total = length + ids.shape[1]
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(length, total)[None],
        }
        taken = {value.name for value in self._session.get_inputs()}
        feeds = {name: array for name, array in feeds.items() if name in taken}
        feeds |= {name: array[:, :, :length] for name, array in past.items()}
        presents = [name.replace("past_key_values", "present") for name in past]
        logits, *present = self._session.run(["logits", *presents], feeds)
        past.update((name, np.asarray(array)) for name, array in zip(list(past), present, strict=True))
        return np.asarray(logits, np.float32)


def require_known_interface(session: ort.InferenceSession) -> None:
    """InputRefused unless the graph has a cache of (batch, heads, slots, head size) under optimum's usual names."""
    inputs = {value.name: value for value in session.get_inputs()}
    keys = [value for name, value in inputs.items() if name.startswith("past_key_values.") and name.endswith(".key")]
    fits = keys and all(
        len(value.shape) == 4 and isinstance(value.shape[1], int) and isinstance(value.shape[3], int) for value in keys
    )
    unknown = [
        name
        for name in inputs
        if name not in ("input_ids", "attention_mask", "position_ids") and not name.startswith("past_key_values.")
    ]
    if not fits or unknown or "input_ids" not in inputs:
        raise InputRefused(
            f"a graph with the inputs {', '.join(list(inputs)[:5])}, ...",
            expected="input_ids, attention_mask, position_ids and past_key_values.{i}.key|value with four dimensions",
            todo="run it with optimum's ORTModelForCausalLM",
        )
