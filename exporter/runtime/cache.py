"""The key-value cache: one buffer per layer that the graph extends in place."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from mmap import mmap

import numpy as np
import onnxruntime as ort
import torch

from exporter.errors import EnvironmentLacking
from exporter.files import human_bytes
from exporter.runtime.adapters import ActiveAdapter


@dataclass(frozen=True, slots=True)
class CacheShape:
    layers: int
    heads: int
    head_size: int
    dtype: type[np.float32] | type[np.float16]
    device: str  # cpu or cuda

    def row_bytes(self, capacity: int) -> int:
        """Of one row in one buffer."""
        return self.heads * capacity * self.head_size * np.dtype(self.dtype).itemsize

    def nbytes(self, rows: int, capacity: int) -> int:
        return 2 * self.layers * rows * self.row_bytes(capacity)


class KeyValueCache:
    """`lengths[b]` slots of row b are filled. Buffers are (rows, heads, capacity, head size); key and value per layer.

    Slots start as zeros, so a masked slot never holds NaN. `adapters[b]`: whose keys and values row b holds.
    """

    def __init__(self, shape: CacheShape, rows: int, capacity: int, adapter: str | None = None) -> None:
        self.shape, self.rows, self.capacity = shape, rows, capacity
        self.adapters: list[str | None] = [adapter] * rows
        self.lengths = np.zeros(rows, np.int64)
        self._bindings: dict[tuple[str | None, int, int], ort.IOBinding] = {}
        self._buffers = [self._zeros(capacity) for _ in range(2 * shape.layers)]

    def _zeros(self, capacity: int) -> torch.Tensor:
        # Mapped memory costs only the pages where something is written. torch's zeros are written at once, and numpy's
        # come in pages of 2 MB: the first token of a row would take all of the row.
        shape = (self.rows, self.shape.heads, capacity, self.shape.head_size)
        try:
            mapped = mmap(-1, max(1, self.rows * self.shape.row_bytes(capacity)))
        except (OSError, ValueError, OverflowError) as error:
            self._buffers = []  # some may have grown already: none of them can be used any more
            raise EnvironmentLacking(
                f"no memory for a cache of {human_bytes(self.shape.nbytes(self.rows, capacity))}",
                expected=f"room for {self.rows} rows of {capacity} positions",
                todo="use fewer rows, or shorter ones",
            ) from error
        zeros = np.frombuffer(mapped, self.shape.dtype, count=math.prod(shape)).reshape(shape)
        return torch.from_numpy(zeros).to(self.shape.device)

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` slots a row, keeping what is filled; at least doubles when it grows."""
        if capacity <= self.capacity:
            return
        capacity = max(capacity, 2 * self.capacity)
        filled = int(self.lengths.max(initial=0))
        self._bindings.clear()  # they hold the addresses of the buffers that are replaced
        for i, old in enumerate(self._buffers):
            grown = self._zeros(capacity)
            grown[:, :, :filled] = old[:, :, :filled]
            self._buffers[i] = grown
        self._finish_copies()
        self.capacity = capacity

    def copy_slots(self, source: int, target: int, start: int, stop: int) -> None:
        """Slots `start` to `stop` of row `source` into row `target`, which then holds `stop` tokens."""
        for buffer in self._buffers:
            buffer[target, :, start:stop] = buffer[source, :, start:stop]
        self._finish_copies()
        self.lengths[target] = stop

    def swap_rows(self, a: int, b: int) -> None:
        """Exchange all that two rows hold."""
        filled = int(max(self.lengths[a], self.lengths[b]))
        for buffer in self._buffers:
            kept = buffer[a, :, :filled].clone()
            buffer[a, :, :filled] = buffer[b, :, :filled]
            buffer[b, :, :filled] = kept
        self._finish_copies()
        self.lengths[[a, b]] = self.lengths[[b, a]]
        self.adapters[a], self.adapters[b] = self.adapters[b], self.adapters[a]

    def clear_row(self, row: int) -> None:
        """Zeros again: after a computation that may have left NaN there."""
        for buffer in self._buffers:
            buffer[row] = 0
        self._finish_copies()
        self.lengths[row] = 0

    def filled(self, row: int) -> dict[str, np.ndarray]:
        """What a row holds: (heads, slots, head size) by the graph's input name."""
        slots = int(self.lengths[row])
        return {past: buffer[row, :, :slots].cpu().numpy() for past, _, buffer in self._names()}

    def _finish_copies(self) -> None:
        if self.shape.device == "cuda":  # onnxruntime computes on a stream of its own
            torch.cuda.synchronize()

    def binding(self, session: ort.InferenceSession, first: int, count: int, adapter: ActiveAdapter) -> ort.IOBinding:
        """Rows `first` to `first + count` as past and, in the same memory, as present, and the adapter's factors.

        The caller binds the rest. Kept for the next call with the same rows, for binding takes longer than anything
        else that Python does for a token. All calls have to be with one session.
        """
        key = (adapter.name, first, count)
        if key not in self._bindings:
            self._bindings[key] = self._bind(session.io_binding(), first, count)
            adapter.bind(self._bindings[key])
        return self._bindings[key]

    def _bind(self, binding: ort.IOBinding, first: int, count: int) -> ort.IOBinding:
        dimensions = (count, self.shape.heads, self.capacity, self.shape.head_size)
        skip = first * self.shape.row_bytes(self.capacity)
        for past, present, buffer in self._names():
            address = buffer.data_ptr() + skip
            binding.bind_input(past, self.shape.device, 0, self.shape.dtype, dimensions, address)
            binding.bind_output(present, self.shape.device, 0, self.shape.dtype, dimensions, address)
        return binding

    def _names(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        for i, buffer in enumerate(self._buffers):
            which = f"{i // 2}.{('key', 'value')[i % 2]}"
            yield f"past_key_values.{which}", f"present.{which}", buffer
