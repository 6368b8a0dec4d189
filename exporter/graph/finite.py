"""Weights that are no numbers are refused before a graph points at them."""

from collections.abc import Iterable

import torch

from exporter.errors import InputRefused
from exporter.sources.tensors import FLOATS, TensorInfo, read_bytes
from exporter.sources.values import DTYPES

BLOCK = 16 << 20


def require_finite(tensors: Iterable[TensorInfo]) -> None:
    """InputRefused, naming the first tensor that holds NaN or infinity. Reads every value, a block at a time."""
    for info in tensors:
        for start in range(0, info.nbytes if info.dtype in FLOATS else 0, BLOCK):
            data = read_bytes(info.file, info.offset + start, min(BLOCK, info.nbytes - start))
            low, high = torch.aminmax(torch.frombuffer(data, dtype=DTYPES[info.dtype]))  # a NaN reaches both
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise InputRefused(
                    f"{info.name!r} in {info.file} holds NaN or infinity",
                    expected="finite weights",
                    todo="fetch or merge it again",
                )
