"""The inner loops of `quantize`, compiled: a tile meets all its arithmetic while it is in a first-level cache.

Each function takes `width` outputs of values (block, N), from `first` on, side by side: they become the lanes of vector
instructions, which only indices into whole arrays do, and where they are offset only unsigned ones: one that might
count from the end is looked up number by number. No sum runs across lanes, so that every machine finds the same bits.
Arrays that functions fill are their last arguments.
"""

import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Float = NDArray[np.float32]
ELEMENTS = 1 << 12  # of a block of some outputs: it and its products stay in a first-level cache
LANES = 16  # at the least
WORD = 32  # bits of codes that are written at once
ROOM = 256 << 20  # address space; compiling took 170 MB

ZERO, ONE, TWO = np.float32(0), np.float32(1), np.float32(2)
TINY = np.float32(1e-30)  # the reciprocal of less would overflow
INFINITY = np.float32(np.inf)
HALF_NORMAL = np.float32(2.0**-14)  # the smallest float16 with all its 11 bits
HALF_STEPS, HALF_STEP = np.float32(2.0**24), np.float32(2.0**-24)  # below it float16 has multiples of 2^-24
HALF_END = np.float32(65520)  # from here on float16 rounds to infinity


def compiled(signature: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile now, in a few seconds, and keep the code beside this file or in the user's cache where that can be.

    MemoryError where there is no room for the compiler, which would end the process.
    """
    try:
        mmap.mmap(-1, ROOM).close()
    except OSError as error:
        raise MemoryError("cannot allocate memory to compile the quantization") from error

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return njit(signature, nogil=True, error_model="numpy", cache=True)(function)
        except (RuntimeError, OSError):  # no place to keep it, or a full disk
            return njit(signature, nogil=True, error_model="numpy")(function)

    return decorate


@njit(error_model="numpy")
def _extremes(values: Float, first: int, width: int, limit: np.float32, extreme: Float) -> bool:
    """The value of largest magnitude, with its sign. False if one is NaN or not below limit."""
    low, high = np.zeros(len(extreme), np.float32), np.zeros(len(extreme), np.float32)
    spoilt = np.zeros(len(extreme), np.float32)
    for j in range(len(values)):
        for n in range(width):
            value = values[j, np.uintp(first + n)]
            low[n] = value if value < low[n] else low[n]
            high[n] = value if value > high[n] else high[n]
            spoilt[n] += value - value  # NaN for NaN and infinity
    good = True
    for n in range(width):
        extreme[n] = high[n] if high[n] > -low[n] else low[n]
        good &= abs(extreme[n]) < limit and spoilt[n] == ZERO
    return good


@njit(error_model="numpy")
def _code(value: np.float32, per_scale: np.float32, lowest: np.float32, highest: np.float32) -> np.float32:
    """The nearest whole multiple that is a code."""
    code = np.rint(value * per_scale)
    code = lowest if code < lowest else code
    return highest if code > highest else code


@njit(error_model="numpy")
def _overlaps(
    values: Float,
    first: int,
    width: int,
    per_scale: Float,
    lowest: np.float32,
    highest: np.float32,
    products: Float,
    square: Float,
) -> None:
    """<w, q> in the first row of products (block, lanes), and <q, q>, of values and their codes q.

    <w, q> is summed by halves, which errs less than one after the other; <q, q> is whole, and exact in any order.
    """
    square[:] = ZERO
    for j in range(len(values)):
        for n in range(width):
            value = values[j, np.uintp(first + n)]
            code = _code(value, per_scale[n], lowest, highest)
            products[j, n] = value * code
            square[n] += code * code
    size = len(values)
    while size > 1:
        size //= 2
        for j in range(size):
            for n in range(width):
                products[j, n] += products[size + j, n]


@njit(error_model="numpy")
def round_to_half(values: Float) -> None:
    """float32 to the nearest float16, ties to even, in place; NaN stays NaN.

    In a normal float16 the last 13 of float32's 23 bits are zero; adding just under half of their range, and one more
    where the bit before them is set, carries into that bit when it has to be rounded up.
    """
    bits, rounded = values.view(np.uint32), np.empty(len(values), np.uint32)
    normal = rounded.view(np.float32)
    for n in range(len(values)):
        up = np.uint32(0xFFF) + ((bits[n] >> np.uint32(13)) & np.uint32(1))
        rounded[n] = (bits[n] + up) & np.uint32(0xFFFFE000)
    for n in range(len(values)):
        size = abs(values[n])
        below = np.rint(values[n] * HALF_STEPS) * HALF_STEP
        beyond = INFINITY if values[n] > ZERO else -INFINITY
        rest = beyond if size >= HALF_END else values[n]  # NaN
        large = normal[n] if size < HALF_END else rest
        values[n] = below if size < HALF_NORMAL else large


@njit(error_model="numpy")
def _encode(
    values: Float,
    first: int,
    width: int,
    bits: int,
    per_scale: Float,
    lowest: np.float32,
    highest: np.float32,
    words: NDArray[np.uint32],
) -> None:
    """words (block * bits / 32, lanes): the values' codes from 0 on, the first in the lowest bits."""
    each, offset = WORD // bits, np.int32(-lowest)
    words[:] = np.uint32(0)
    for j in range(len(values)):
        word, shift = j // each, np.uint32(bits * (j % each))
        for n in range(width):
            code = _code(values[j, np.uintp(first + n)], per_scale[n], lowest, highest)
            words[word, n] |= np.uint32(np.int32(code) + offset) << shift


@compiled("boolean(float32[:,:,::1], float32[::1], int64, float32, uint32[:,:,:], float32[:,:])")
def quantize_tile(
    values: Float, reaches: Float, bits: int, limit: np.float32, words: NDArray[np.uint32], scales: Float
) -> bool:
    """Codes and scales of values (K, block, N), as `quantize_matrix` describes them. False if a value has no scale.

    words (N, K, block * bits / 32): codes, as bytes in a little-endian machine's order. scales (N, K): float32 numbers
    that float16 can hold. limit: what the largest value must stay below.
    """
    blocks, block, outputs = values.shape
    lanes = max(LANES, ELEMENTS // block)
    lowest, highest = np.float32(-(1 << (bits - 1))), np.float32((1 << (bits - 1)) - 1)
    extreme, unit, per_scale = np.zeros(lanes, np.float32), np.zeros(lanes, np.float32), np.zeros(lanes, np.float32)
    square, scale = np.zeros(lanes, np.float32), np.zeros(lanes, np.float32)
    best, least = np.zeros(lanes, np.float32), np.zeros(lanes, np.float32)
    products, codes = np.zeros((block, lanes), np.float32), np.zeros((block * bits // WORD, lanes), np.uint32)
    good = True
    for first in range(0, outputs, lanes):
        width = min(lanes, outputs - first)
        for k in range(blocks):  # within: the codes of an output lie one after the other
            good &= _extremes(values[k], first, width, limit, extreme)
            # The extreme goes to the negative end, which has one step more.
            for n in range(width):
                unit[n] = -ONE / extreme[n] if abs(extreme[n]) > TINY else ZERO
                best[n], least[n] = ZERO, ZERO
            for reach in reaches:
                for n in range(width):
                    per_scale[n] = unit[n] * reach
                _overlaps(values[k], first, width, per_scale, lowest, highest, products, square)
                for n in range(width):
                    scale[n] = products[0, n] / square[n]
                round_to_half(scale)
                for n in range(width):  # less <w, w>; NaN for a block of zeros, which is never better
                    error = scale[n] * (scale[n] * square[n] - TWO * products[0, n])
                    if error < least[n]:
                        best[n], least[n] = scale[n], error
            for n in range(width):
                per_scale[n] = ONE / best[n] if best[n] != ZERO else ZERO
                scales[first + n, k] = best[n] if best[n] != ZERO else ONE
            _encode(values[k], first, width, bits, per_scale, lowest, highest, codes)
            for n in range(width):
                for word in range(len(codes)):
                    words[first + n, k, word] = codes[word, n]
    return good
