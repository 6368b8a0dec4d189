"""Stream a checkpoint into a bundle's own weights.safetensors: one tensor at a time, in blocks of rows."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from exporter.errors import EnvironmentLacking, InputRefused
from exporter.files import publish, require_free_space
from exporter.graph.quantize import BLOCK, pack, quantize_blocks
from exporter.graph.weights import SCALES, ZERO_POINTS, codes_name
from exporter.merging.layout import ShardLayout, Slot, lay_out
from exporter.progress import SILENT, Progress
from exporter.sources.checkpoint import TensorInfo, read_rows, read_tensor
from exporter.sources.tensors import DTYPES, FLOATS, NAMES

# Elements in work at once: about 30 bytes each with the search's temporaries, so 64 MB.
ELEMENTS = 2 << 20


@dataclass(frozen=True, slots=True)
class Stored:
    """How one tensor enters the bundle: in `dtype` (safetensors name), or in `bits`-bit blocks."""

    source: TensorInfo
    dtype: str
    bits: int = 0
    transposed: bool = False  # Conv1D: the checkpoint holds W^T
    scale_dtype: str = "F32"

    def slots(self) -> list[Slot]:
        """The tensors of the output file."""
        info = self.source
        if not self.bits:
            return [_slot(info.name, self.dtype, info.shape)]
        rows, columns = info.shape[::-1] if self.transposed else info.shape
        if columns % BLOCK:
            raise InputRefused(
                f"{info.name!r} has {columns} inputs", expected=f"a multiple of {BLOCK} for a quantized export"
            )
        codes, blocks = codes_name(info.name, self.bits, transposed=self.transposed), columns // BLOCK
        slots = [
            _slot(codes, "U8", (rows, blocks, BLOCK * self.bits // 8)),
            _slot(codes + SCALES, self.scale_dtype, (rows, blocks)),
        ]
        if self.bits < 8:
            slots.append(_slot(codes + ZERO_POINTS, "U8", (rows, -(-blocks * self.bits // 8))))
        return slots


def _slot(name: str, dtype: str, shape: tuple[int, ...]) -> Slot:
    count = 1
    for size in shape:
        count *= size
    return Slot(name, dtype, shape, count * DTYPES[dtype].itemsize)


def write_weights(path: Path, tensors: Mapping[str, Stored], progress: Progress = SILENT) -> dict[str, str]:
    """Write `path` whole or not at all; returns the SHA-256 of each tensor in it.

    Raises EnvironmentLacking before writing when the disk is too small, InputRefused for values that are not finite
    or that do not fit the type asked for.
    """
    layout = lay_out(slot for stored in tensors.values() for slot in stored.slots())
    require_free_space(path.parent, layout.size, f"writing {path.name}")
    partial = path.with_name(f".{path.name}.partial")
    digests: dict[str, str] = {}
    total = sum(stored.source.nbytes for stored in tensors.values())
    try:
        with partial.open("wb", buffering=0) as file, progress.task(f"write {path.name}", total, "B") as task:
            file.truncate(layout.size)
            sink = _Sink(file.fileno(), layout)
            sink.write(0, memoryview(layout.header))
            for stored in tensors.values():
                for name, block in _quantized(stored) if stored.bits else _converted(stored):
                    sink.put(name, block)
                task.advance(stored.source.nbytes)
            digests = sink.finish()
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


def _row_blocks(info: TensorInfo, multiple: int) -> Iterator[torch.Tensor]:
    """Blocks of rows in float32 (or as stored, for a tensor that is not floating-point), checked to be finite."""
    if not info.shape:
        yield read_tensor(info)
        return
    columns = max(1, info.nbytes // DTYPES[info.dtype].itemsize // max(1, info.rows))
    step = max(multiple, ELEMENTS // columns // multiple * multiple)
    for start in range(0, info.rows, step):
        rows = read_rows(info, start, min(info.rows, start + step))
        if info.dtype in FLOATS and not torch.isfinite(rows).all():
            raise InputRefused(f"{info.name!r} holds NaN or infinity", expected="finite weights")
        yield rows


def _converted(stored: Stored) -> Iterator[tuple[str, torch.Tensor]]:
    info, dtype = stored.source, DTYPES[stored.dtype]
    for rows in _row_blocks(info, 1):
        values = rows.to(dtype)
        if dtype.is_floating_point and not torch.isfinite(values).all():
            raise InputRefused(
                f"{info.name!r} overflows in {NAMES[dtype]}",
                expected=f"values up to {torch.finfo(dtype).max:.0f}",
                todo="export another precision",
            )
        yield info.name, values


def _quantized(stored: Stored) -> Iterator[tuple[str, torch.Tensor]]:
    info, bits = stored.source, stored.bits
    name = codes_name(info.name, bits, transposed=stored.transposed)
    scale_dtype = DTYPES[stored.scale_dtype]
    if not stored.transposed:
        for rows in _row_blocks(info, 1):
            q = quantize_blocks(rows.float().reshape(rows.shape[0], -1, BLOCK), bits, scale_dtype)
            yield name, pack(q.codes, bits)
            yield name + SCALES, q.scales.to(scale_dtype)
            if q.zero_points is not None:
                yield name + ZERO_POINTS, pack(q.zero_points, bits)
        return
    # Rows of W^T are slices of every block row of W: codes of the whole tensor wait in memory, a byte a weight or less.
    columns, rows = info.shape
    codes = torch.empty(rows, columns // BLOCK, BLOCK * bits // 8, dtype=torch.uint8)
    scales = torch.empty(rows, columns // BLOCK, dtype=scale_dtype)
    zero_points = torch.empty(rows, columns // BLOCK, dtype=torch.uint8)
    at = 0
    for part in _row_blocks(info, BLOCK):
        count = part.shape[0] // BLOCK
        q = quantize_blocks(part.T.float().reshape(rows, count, BLOCK), bits, scale_dtype)
        codes[:, at : at + count], scales[:, at : at + count] = pack(q.codes, bits), q.scales.to(scale_dtype)
        if q.zero_points is not None:
            zero_points[:, at : at + count] = q.zero_points
        at += count
    yield name, codes
    yield name + SCALES, scales
    if bits < 8:
        yield name + ZERO_POINTS, pack(zero_points, bits)
