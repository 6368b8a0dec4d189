"""A tensor in a file: what its header says, and how its bytes become values."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from exporter.errors import EnvironmentLacking, InputRefused

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
        """Rows of the tensor as a matrix: a stack of matrices (three dimensions or more) is taken row by row."""
        return math.prod(self.shape[:-1]) if len(self.shape) > 2 else self.shape[0] if self.shape else 1

    @property
    def row_shape(self) -> tuple[int, ...]:
        return self.shape[-1:] if len(self.shape) > 1 else ()

    @property
    def row_bytes(self) -> int:
        return self.nbytes // self.rows if self.rows else 0


def read_into(handle: int, buffer: memoryview, offset: int, file: Path) -> None:
    """Fill `buffer` from `offset` of an open file. InputRefused if it ends before, EnvironmentLacking if it fails."""
    done = 0
    while done < len(buffer):
        try:
            got = os.preadv(handle, [buffer[done:]], offset + done)
        except OSError as error:
            raise EnvironmentLacking(
                f"reading {file} at byte {offset + done} failed: {error.strerror}",
                todo="check the disk, then run the same command again",
            ) from error
        if got == 0:
            raise InputRefused(
                f"{file} ends at byte {offset + done}, inside a tensor",
                expected=f"{offset + len(buffer)} bytes or more",
                todo="fetch or copy the file again",
            )
        done += got


def open_to_read(file: Path) -> int:
    """A handle of `file`; InputRefused where it is gone, EnvironmentLacking where it cannot be opened."""
    try:
        return os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise InputRefused(
            f"{file} is gone", expected="files that stay as they are during a merge", todo="check the path"
        ) from error
    except OSError as error:
        raise EnvironmentLacking(
            f"{file} cannot be opened: {error.strerror}", todo="check its permissions and the disk"
        ) from error


def read_bytes(file: Path, offset: int, count: int) -> bytearray:
    """`count` bytes at `offset`; InputRefused if the file ends before them."""
    data = bytearray(count)
    handle = open_to_read(file)
    try:
        read_into(handle, memoryview(data), offset, file)
    finally:
        os.close(handle)
    return data


def read_rows(info: TensorInfo, start: int, stop: int) -> torch.Tensor:
    """Rows `start` to `stop`, (stop - start, *row_shape), in the stored dtype: a fresh copy."""
    shape = (stop - start, *info.row_shape)
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=DTYPES[info.dtype])
    data = read_bytes(info.file, info.offset + start * info.row_bytes, (stop - start) * info.row_bytes)
    return torch.frombuffer(data, dtype=DTYPES[info.dtype]).reshape(shape)


def read_columns(info: TensorInfo, start: int, stop: int) -> torch.Tensor:
    """Columns `start` to `stop` of a matrix, (rows, stop - start), in the stored dtype: a fresh copy."""
    size = item_size(info.dtype)
    data = bytearray(info.rows * (stop - start) * size)
    view, width = memoryview(data), (stop - start) * size
    handle = open_to_read(info.file)
    try:
        for row in range(info.rows):
            at = info.offset + row * info.row_bytes + start * size
            read_into(handle, view[row * width : (row + 1) * width], at, info.file)
    finally:
        os.close(handle)
    return torch.frombuffer(data, dtype=DTYPES[info.dtype]).reshape(info.rows, stop - start)


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """The whole tensor in its stored dtype: a fresh copy."""
    if math.prod(info.shape) == 0:
        return torch.empty(info.shape, dtype=DTYPES[info.dtype])
    data = read_bytes(info.file, info.offset, info.nbytes)
    return torch.frombuffer(data, dtype=DTYPES[info.dtype]).reshape(info.shape)


def equal_bytes(first: TensorInfo, second: TensorInfo, block: int = 16 << 20) -> bool:
    """True if two tensors have one type, one shape and the same bytes."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    for start in range(0, first.nbytes, block):
        count = min(block, first.nbytes - start)
        if read_bytes(first.file, first.offset + start, count) != read_bytes(second.file, second.offset + start, count):
            return False
    return True
