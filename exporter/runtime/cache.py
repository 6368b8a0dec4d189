"""The key-value cache: one buffer per layer that the graph extends in place."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from exporter.errors import EnvironmentLacking
from exporter.files import human_bytes


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

    Slots start as zeros, so a masked slot never holds NaN. `adapter`: whose keys and values these are.
    """

    def __init__(self, shape: CacheShape, rows: int, capacity: int, adapter: str | None = None) -> None:
        self.shape, self.rows, self.capacity, self.adapter = shape, rows, capacity, adapter
        self.lengths = np.zeros(rows, np.int64)
        self._whole: tuple[ort.InferenceSession, ort.IOBinding] | None = None
        self._buffers = [self._allocate(capacity) for _ in range(2 * shape.layers)]

    def _allocate(self, capacity: int) -> ort.OrtValue:
        # From zeros, not from a shape alone: that memory would be whatever lay there.
        return ort.OrtValue.ortvalue_from_numpy(self._zeros(capacity), self.shape.device, 0)

    def _zeros(self, capacity: int) -> np.ndarray:
        try:
            return np.zeros((self.rows, self.shape.heads, capacity, self.shape.head_size), self.shape.dtype)
        except MemoryError as error:
            self._buffers = []  # some may have grown already: none of them can be used any more
            raise EnvironmentLacking(
                f"no memory for a cache of {human_bytes(self.shape.nbytes(self.rows, capacity))}",
                expected=f"room for {self.rows} rows of {capacity} positions",
                todo="use fewer rows, or shorter ones",
            ) from error

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` slots a row, keeping what is filled; at least doubles when it grows."""
        if capacity <= self.capacity:
            return
        capacity = max(capacity, 2 * self.capacity)
        filled = int(self.lengths.max(initial=0))
        self._whole = None  # it holds the buffers that are replaced
        for i, old in enumerate(self._buffers):
            values = self._zeros(capacity)
            values[:, :, :filled] = old.numpy()[:, :, :filled]
            self._buffers[i] = ort.OrtValue.ortvalue_from_numpy(values, self.shape.device, 0)
        self.capacity = capacity

    def binding(self, session: ort.InferenceSession, first: int, count: int) -> ort.IOBinding:
        """Rows `first` to `first + count` as past and, in the same memory, as present; the caller binds the rest.

        All rows are bound once, for that takes longer than anything else that Python does for a token.
        """
        if count < self.rows:
            return self._bound_rows(session.io_binding(), first, count)
        if self._whole is None or self._whole[0] is not session:
            binding = session.io_binding()
            for past, present, buffer in self._names():
                binding.bind_ortvalue_input(past, buffer)
                binding.bind_ortvalue_output(present, buffer)
            self._whole = (session, binding)
        return self._whole[1]

    def _bound_rows(self, binding: ort.IOBinding, first: int, count: int) -> ort.IOBinding:
        dimensions = (count, self.shape.heads, self.capacity, self.shape.head_size)
        skip = first * self.shape.row_bytes(self.capacity)
        for past, present, buffer in self._names():
            address = buffer.data_ptr() + skip
            binding.bind_input(past, self.shape.device, 0, self.shape.dtype, dimensions, address)
            binding.bind_output(present, self.shape.device, 0, self.shape.dtype, dimensions, address)
        return binding

    def _names(self) -> Iterator[tuple[str, str, ort.OrtValue]]:
        for i, buffer in enumerate(self._buffers):
            which = f"{i // 2}.{('key', 'value')[i % 2]}"
            yield f"past_key_values.{which}", f"present.{which}", buffer
