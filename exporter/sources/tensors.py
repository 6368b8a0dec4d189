"""A tensor in a file: what its header says, and how its bytes become values."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from exporter.errors import InputRefused

# safetensors' names, in the order of its specification
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = frozenset({"F16", "BF16", "F32", "F64"})


def item_size(dtype: str) -> int:
    """Bytes of one element of the safetensors type `dtype`."""
    return DTYPES[dtype].itemsize


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One row-major tensor: `nbytes` bytes from the absolute `offset` of `file`. No value has been read."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return self.nbytes // self.rows if self.rows else 0


def read_bytes(file: Path, offset: int, count: int) -> bytearray:
    """`count` bytes at `offset`; InputRefused if the file ends before them."""
    data = bytearray(count)
    view, done = memoryview(data), 0
    handle = os.open(file, os.O_RDONLY)
    try:
        while done < count:
            got = os.preadv(handle, [view[done:]], offset + done)
            if got == 0:
                raise InputRefused(
                    f"{file} ends at byte {offset + done}, inside a tensor",
                    expected=f"{offset + count} bytes or more",
                    todo="fetch or copy the file again",
                )
            done += got
    finally:
        os.close(handle)
    return data


def read_rows(info: TensorInfo, start: int, stop: int) -> torch.Tensor:
    """Rows `start` to `stop` of the first dimension, in the stored dtype: a fresh copy."""
    shape = (stop - start, *info.shape[1:])
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=DTYPES[info.dtype])
    data = read_bytes(info.file, info.offset + start * info.row_bytes, (stop - start) * info.row_bytes)
    return torch.frombuffer(data, dtype=DTYPES[info.dtype]).reshape(shape)


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """The whole tensor in its stored dtype: a fresh copy."""
    if not info.shape:
        return torch.frombuffer(read_bytes(info.file, info.offset, info.nbytes), dtype=DTYPES[info.dtype]).reshape(())
    return read_rows(info, 0, info.shape[0])
