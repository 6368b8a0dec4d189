"""The values of a tensor in a file."""

import math
import os

import torch

from exporter.sources.tensors import TensorInfo, item_size, open_to_read, read_bytes, read_into

# What each of safetensors' types is in torch
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
