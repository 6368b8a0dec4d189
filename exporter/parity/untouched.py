"""Is a weight that no adapter changes what stands in the base?"""

import numpy as np
import torch

from exporter.graph.weights import Quantized, Weight
from exporter.parity.elements import Rounding, allowed_roundings, read_values, round_to, within_step
from exporter.sources.tensors import FLOATS, TensorInfo
from exporter.sources.values import DTYPES, read_tensor


def untouched(
    weight: Weight, original: torch.Tensor, base: TensorInfo, merge_dtype: str | None, *, on_codes: bool
) -> bool:
    """Is `weight` what stands in the base? original: the base's values, or what their codes mean (float32)."""
    if weight.shape != base.shape:
        return False
    if isinstance(weight, Quantized):
        return within_step(weight, read_values(weight), original.double().numpy())
    stored, roundings = read_tensor(weight), allowed_roundings(weight, base, merge_dtype)
    if on_codes:
        values = original.double().numpy()
        return any(np.array_equal(stored.double().numpy(), round_to(values, *rounding)) for rounding in roundings)
    if weight.dtype not in FLOATS or base.dtype not in FLOATS:
        return torch.equal(stored, original)
    return any(_bytes(stored) == _bytes(_converted(original, rounding)) for rounding in roundings)


def _converted(values: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    for dtype in rounding:
        values = values.to(DTYPES[dtype])
    return values


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
