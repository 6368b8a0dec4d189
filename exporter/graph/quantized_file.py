"""Stream a checkpoint into a bundle's own weights.safetensors: a tensor at a time, in blocks of rows, on all cores."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from exporter.errors import EnvironmentLacking, InputRefused
from exporter.files import partial_path, publish, require_free_space
from exporter.graph.quantize import quantize_matrix
from exporter.graph.weights import BLOCK, SCALES, codes_name
from exporter.merging.layout import ShardLayout, Slot, lay_out
from exporter.merging.threads import single_threaded, thread_pool
from exporter.progress import SILENT, Progress
from exporter.sources.tensors import FLOATS, TensorInfo
from exporter.sources.unchanged import require_unchanged, watch
from exporter.sources.values import DTYPES, NAMES, read_rows, read_tensor

# Elements that a thread reads at once: 4 MB in float16.
ELEMENTS = 2 << 20
Named = tuple[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Stored:
    """How one tensor enters the bundle: in `dtype` (safetensors name), or in `bits`-bit blocks.

    exact: with the codes and the row scales that bitsandbytes gives a Conv1D, instead of a search for good scales.
    block: weights that share a scale.
    """

    source: TensorInfo
    dtype: str
    bits: int = 0
    transposed: bool = False  # Conv1D: the checkpoint holds W^T
    exact: bool = False
    block: int = BLOCK

    @property
    def shape(self) -> tuple[int, ...]:
        """(outputs, inputs) of a quantized matrix."""
        return self.source.shape[::-1] if self.transposed else self.source.shape

    @property
    def codes_name(self) -> str:
        return codes_name(self.source.name, self.bits, self.shape[1], self.block, transposed=self.transposed)

    @property
    def scale_dtype(self) -> str:
        return "F32" if self.exact else "F16"

    def slots(self) -> list[Slot]:
        """The tensors of the output file."""
        if not self.bits:
            return [_slot(self.source.name, self.dtype, self.source.shape)]
        outputs, inputs = self.shape
        blocks = -(-inputs // self.block)
        return [
            _slot(self.codes_name, "U8", (outputs, blocks, self.block * self.bits // 8)),
            _slot(self.codes_name + SCALES, self.scale_dtype, (outputs, blocks)),
        ]


def _slot(name: str, dtype: str, shape: tuple[int, ...]) -> Slot:
    return Slot(name, dtype, shape, prod(shape) * DTYPES[dtype].itemsize)


def bits_per_weight(tensors: Iterable[Stored]) -> float:
    """Bits of the file for each weight, scales and padding counted."""
    tensors = list(tensors)
    bits = 8 * sum(slot.nbytes for stored in tensors for slot in stored.slots())
    return round(bits / sum(prod(stored.source.shape) for stored in tensors), 4)


def write_weights(
    path: Path,
    tensors: Mapping[str, Stored],
    progress: Progress = SILENT,
    *,
    extra: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, str]:
    """Write `path` whole or not at all; returns the SHA-256 of each tensor in it. `extra`: small tensors by name.

    One tensor is quantized by all cores while the one before is hashed and written; no more than two are in memory.
    Raises EnvironmentLacking before writing when the disk is too small, InputRefused for values that are not finite
    or that do not fit the type asked for, and for a file that was replaced while it was read.
    """
    extra = extra or {}
    watched = watch(stored.source.file for stored in tensors.values())
    small = [_slot(name, NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in extra.items()]
    layout = lay_out([*(slot for stored in tensors.values() for slot in stored.slots()), *small])
    require_free_space(path.parent, layout.size, f"writing {path.name}")
    partial = partial_path(path)
    total = sum(stored.source.nbytes for stored in tensors.values())
    try:
        with (
            partial.open("wb", buffering=0) as file,
            progress.task(f"write {path.name}", total, "B") as task,
            single_threaded(),
            thread_pool() as pool,
            thread_pool(1) as writer,
        ):
            file.truncate(layout.size)
            sink = _Sink(file.fileno(), layout)
            sink.write(0, memoryview(layout.header))
            pending: Future[None] = writer.submit(sink.put_all, extra.items())
            for stored in tensors.values():
                parts = _quantized(stored, pool) if stored.bits else _converted(stored)
                pending.result()
                pending = writer.submit(sink.put_all, parts)
                task.advance(stored.source.nbytes)
            pending.result()
            digests = sink.finish()
        require_unchanged(watched)
        publish(partial, path)
    except OSError as error:
        raise EnvironmentLacking(
            f"writing {path.name} failed: {error.strerror or error}", todo="free disk space, then run it again"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return digests


class _Sink:
    """Appends blocks to tensors that lie at fixed offsets, and hashes each tensor as it grows."""

    def __init__(self, handle: int, layout: ShardLayout) -> None:
        self._handle = handle
        self._at = dict(layout.offsets)
        self._hashes = {name: hashlib.sha256() for name in layout.offsets}
        ends = sorted([*layout.offsets.values(), layout.size])
        self._end = {name: ends[ends.index(start) + 1] for name, start in layout.offsets.items()}

    def put_all(self, parts: Iterable[Named]) -> None:
        for name, block in parts:
            self.put(name, block)

    def put(self, name: str, block: torch.Tensor) -> None:
        data = block.contiguous().reshape(-1).view(torch.uint8).numpy().data
        self.write(self._at[name], data)
        self._hashes[name].update(data)
        self._at[name] += len(data)

    def write(self, offset: int, data: memoryview) -> None:
        while len(data):
            count = os.pwrite(self._handle, data, offset)
            data, offset = data[count:], offset + count

    def finish(self) -> dict[str, str]:
        unfinished = [name for name, at in self._at.items() if at != self._end[name]]
        assert not unfinished, unfinished
        return {name: digest.hexdigest() for name, digest in self._hashes.items()}


def _row_ranges(info: TensorInfo, multiple: int) -> list[tuple[int, int]]:
    """Ranges of rows of about ELEMENTS elements, each a multiple of `multiple` but for the last."""
    columns = max(1, info.nbytes // DTYPES[info.dtype].itemsize // max(1, info.rows))
    step = max(multiple, ELEMENTS // columns // multiple * multiple)
    return [(start, min(info.rows, start + step)) for start in range(0, info.rows, step)]


def _converted(stored: Stored) -> Iterator[Named]:
    info, dtype = stored.source, DTYPES[stored.dtype]
    for start, stop in _row_ranges(info, 1) if info.shape else [(0, 1)]:
        rows = read_rows(info, start, stop) if info.shape else read_tensor(info)
        if info.dtype in FLOATS and not torch.isfinite(rows).all():
            raise _not_finite(info, "NaN or infinity")
        values = rows.to(dtype)
        if dtype.is_floating_point and not torch.isfinite(values).all():
            raise InputRefused(
                f"{info.name!r} overflows in {NAMES[dtype]}",
                expected=f"values up to {torch.finfo(dtype).max:.0f}",
                todo="export another precision",
            )
        yield info.name, values


def _not_finite(info: TensorInfo, what: str) -> InputRefused:
    return InputRefused(f"{info.name!r} holds {what}", expected="finite weights")


def _quantized(stored: Stored, pool: ThreadPoolExecutor) -> list[Named]:
    """Codes and scales of the whole tensor, in memory: at 6.7B, 67 MB for a matrix and 220 MB for the embedding."""
    codes_slot, scales_slot = stored.slots()
    codes = torch.empty(codes_slot.shape, dtype=torch.uint8)
    scales = torch.empty(scales_slot.shape, dtype=DTYPES[stored.scale_dtype])
    info = stored.source
    ranges = _row_ranges(info, stored.block if stored.transposed else 1)
    if stored.exact:
        from exporter.merging import int8  # it imports transformers, which other precisions do without

        maxima = pool.map(lambda rows: int8.absmax_block(read_rows(info, *rows), "in_out"), ranges)
        absmax = torch.stack(list(maxima)).amax(0)  # (outputs,), NaN where one is
        scales.copy_((absmax * int8.RECIPROCAL).unsqueeze(1).expand_as(scales))
        part = _exact_part(info, absmax, codes)
    else:
        part = _searched_part(stored, codes, scales)
    try:
        list(pool.map(part, ranges))
    except ValueError as error:
        raise _not_finite(info, f"what {stored.bits} bits cannot hold: {error}") from error
    return [(codes_slot.name, codes), (scales_slot.name, scales)]


Part = Callable[[tuple[int, int]], None]


def _searched_part(stored: Stored, codes: torch.Tensor, scales: torch.Tensor) -> Part:
    """Fills the codes and scales that come from a range of the stored rows."""

    def part(rows: tuple[int, int]) -> None:
        values = read_rows(stored.source, *rows)
        if stored.transposed:
            blocks = slice(rows[0] // stored.block, -(-rows[1] // stored.block))
            quantize_matrix(values, stored.bits, codes[:, blocks], scales[:, blocks])
        else:
            quantize_matrix(values.T, stored.bits, codes[slice(*rows)], scales[slice(*rows)])

    return part


def _exact_part(info: TensorInfo, absmax: torch.Tensor, codes: torch.Tensor) -> Part:
    """Fills the codes of a range of a Conv1D's stored rows, shifted by 128 to be unsigned."""
    from exporter.merging.int8 import codes as int8_codes

    def part(rows: tuple[int, int]) -> None:
        shifted = int8_codes(read_rows(info, *rows), absmax, "in_out").add_(-128).view(torch.uint8)  # c - 128 = c + 128
        if missing := -shifted.shape[0] % BLOCK:
            shifted = torch.nn.functional.pad(shifted, (0, 0, 0, missing), value=128)
        blocks = slice(rows[0] // BLOCK, -(-rows[1] // BLOCK))
        codes[:, blocks] = shifted.view(-1, BLOCK, shifted.shape[1]).permute(2, 0, 1)

    return part
