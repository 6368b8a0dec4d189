"""A tensor in a file: what its header says, and its bytes. `values` makes torch tensors of them.

torch takes longer to import than a native export, which needs only headers: nothing here imports it.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from exporter.errors import EnvironmentLacking, InputRefused

# Bytes of one element by safetensors' names, in the order of its specification
ITEM_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
FLOATS = frozenset({"F16", "BF16", "F32", "F64"})


def item_size(dtype: str) -> int:
    """Bytes of one element of the safetensors type `dtype`."""
    return ITEM_SIZES[dtype]


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


def equal_bytes(first: TensorInfo, second: TensorInfo, block: int = 16 << 20) -> bool:
    """True if two tensors have one type, one shape and the same bytes."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    for start in range(0, first.nbytes, block):
        count = min(block, first.nbytes - start)
        if read_bytes(first.file, first.offset + start, count) != read_bytes(second.file, second.offset + start, count):
            return False
    return True
