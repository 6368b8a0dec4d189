"""Is each element of a written weight right: a correct rounding of the merged value, or its nearest code?"""

from collections.abc import Callable, Iterator, Sequence

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from exporter.graph.dequantize import dequantize
from exporter.graph.weights import Quantized, Weight
from exporter.parity.bundles import quantization_steps
from exporter.parity.oracle import Adapted
from exporter.sources.tensors import FLOATS, TensorInfo
from exporter.sources.values import read_tensor

Float = NDArray[np.float64]
Rounding = tuple[str, ...]  # types that a value was rounded to, one after another
Rows = Callable[[slice], Float]  # some rows of a tensor that need not be there as a whole
CODE_ERROR = 2.0**-10  # in steps: float32 arithmetic when a weight is divided by its scale
IN_CACHE = 1 << 14  # numbers of an array that are looked at at once
SUM_ERROR = 2.0**-18  # of float32 sums of products, relative to the largest of a matrix
NUMPY = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F64": np.float64}


def round_to(values: Float, *rounding: str) -> Float:
    """Correctly rounded (half to even) to each of the types in turn (safetensors names), back in float64."""
    with np.errstate(over="ignore"):
        for dtype in rounding:
            values = values.astype(NUMPY[dtype]).astype(np.float64)
    return values


def row_blocks(values: Float) -> Iterator[slice]:
    """Rows of an array, a few at a time: what is computed of them stays in a processor's cache."""
    size = max(1, values[0].size) if len(values) else 1
    step = max(1, IN_CACHE // size)
    for start in range(0, len(values), step):
        yield slice(start, start + step)


def read_values(weight: Weight) -> Float:
    """A weight's values in float64, dequantized where it is quantized."""
    tensor = dequantize(weight) if isinstance(weight, Quantized) else read_tensor(weight)
    return tensor.double().numpy()


def allowed_roundings(weight: TensorInfo, base: TensorInfo, merge_dtype: str | None) -> list[Rounding]:
    """To the stored type alone, or first to what the merge made of it: `merge_dtype`, or the base's own type."""
    between = merge_dtype or base.dtype
    alone: Rounding = (weight.dtype,)
    if between == weight.dtype or not {between, weight.dtype} <= FLOATS:
        return [alone]
    return [alone, (between, weight.dtype)]


def elements_pass(stored: Rows, adapted: Adapted, roundings: Sequence[Rounding]) -> bool:
    """True if all elements are right for one of the roundings: a tensor takes one way, never a mixture."""
    return any(
        all(bool((beyond(stored(rows), adapted, rounding, rows) <= 0).all()) for rows in row_blocks(adapted.merged))
        for rounding in roundings
    )


def beyond(got: Float, adapted: Adapted, rounding: Rounding, rows: slice) -> Float:
    """How far some rows lie outside the bound, in units of the weight; nothing above 0 is right, and no NaN.

    An element must be a correct rounding of some value within the float32 error of PEFT's float64 merge. Rounding is
    monotone, so that is round(W' - e) <= stored <= round(W' + e), with e the slack of the accumulation plus
    2^-24 |W'| for the float32 sum that PEFT rounds from. That sum is itself the rounding where one LoRA is stored in
    float32: a last bit may then differ only where the slack touches a boundary. A value only replaced has e = 0.
    """
    sum_is_stored = rounding == ("F32",) and adapted.is_sum and len(adapted.ranks) == 1
    sum_error = 0.0 if adapted.is_exact or sum_is_stored else 2.0**-24
    merged = adapted.merged[rows]
    error = adapted.slack[rows] + sum_error * np.abs(merged)
    low, high = round_to(merged - error, *rounding), round_to(merged + error, *rounding)
    return np.maximum(low - got, got - high)


def is_near(stored: Float, adapted: Adapted, dtype: str) -> bool:
    """No element is further off than a few roundings of W, the change or their sum: not an error of merging."""
    unit = float(ml_dtypes.finfo(NUMPY[dtype]).eps)

    def near(rows: slice) -> bool:
        merged = adapted.merged[rows]
        size = np.maximum(np.abs(merged), np.abs(adapted.delta_of(rows)))
        return bool((np.abs(stored[rows] - merged) <= 2 * unit * size).all())

    return all(map(near, row_blocks(stored)))


def within_step(weight: Quantized, stored: Float, wanted: Float) -> bool:
    """Every element at its nearest code: within half a step of `wanted`, and half a step of what it was rounded to.

    What was quantized is the merge as stored, at worst in bfloat16: that is up to 2^-9 |W'| from `wanted`, which may
    turn a code. An element that is clipped at an end of its range may lie further out.
    Clipping only ever pulls a weight inwards, and by at most half of its range: an edited scale does neither.
    bitsandbytes gives a row of zeros the scale 0. Its step is then what float32 loses of the adapter's sum beside it.
    """
    steps, clipped = (np.broadcast_to(tensor.numpy(), stored.shape) for tensor in quantization_steps(weight))
    largest = max(wanted.max(initial=0), -wanted.min(initial=0))
    smallest = max(np.finfo(np.float32).tiny, SUM_ERROR * float(largest))

    def within(rows: slice) -> bool:
        got, want, step = stored[rows], wanted[rows], steps[rows]
        size, unit = np.abs(want), np.where(step > 0, step, smallest)
        distance = np.abs(got - want)
        nearest = np.minimum((0.5 + CODE_ERROR) * unit + 2.0**-9 * size, unit)
        far = ~(distance <= np.where(step > 0, nearest, unit))  # a NaN is far
        if not far.any():
            return True
        inward = clipped[rows][far] & (size[far] >= np.abs(got[far]))
        return bool((inward & (distance[far] <= (1 << (weight.bits - 1)) * unit[far])).all())

    return all(map(within, row_blocks(stored)))
