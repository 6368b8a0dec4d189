"""The inner loops of `quantize`, compiled: a tile meets all its arithmetic while it is in a first-level cache.

Each function takes `width` outputs of values (block, N), from `first` on, side by side: they become the lanes of vector
instructions, which only indices into whole arrays do, and where they are offset only unsigned ones: one that might
count from the end is looked up number by number. No sum runs across lanes, so that every machine finds the same bits.
Several weights of a lane are met in one step, in registers: one at a time, reading and writing back what was found so
far takes longer than the arithmetic. Arrays that functions fill are their last arguments.
"""

import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Float = NDArray[np.float32]
ELEMENTS = 1 << 13  # of a block of some outputs: it stays in a first-level cache
LANES = 16  # at the least
TOGETHER = 8  # weights of a block and a lane that are summed in registers
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
def _range_of_2(values: Float, j: int, lane: np.uintp) -> tuple[np.float32, np.float32, np.float32]:
    """The smaller and the larger of two values, and 0, or NaN if one of them is NaN or infinity."""
    one, other = values[j, lane], values[j + 1, lane]
    return (one if one < other else other), (one if one > other else other), (one - one) + (other - other)


@njit(error_model="numpy")
def _range_of_4(values: Float, j: int, lane: np.uintp) -> tuple[np.float32, np.float32, np.float32]:
    low, high, spoilt = _range_of_2(values, j, lane)
    other_low, other_high, other_spoilt = _range_of_2(values, j + 2, lane)
    return (low if low < other_low else other_low), (high if high > other_high else other_high), spoilt + other_spoilt


@njit(error_model="numpy")
def _extremes(
    values: Float,
    first: int,
    width: int,
    limit: np.float32,
    low: Float,
    high: Float,
    spoilt: Float,
    extreme: Float,
) -> bool:
    """The value of largest magnitude, with its sign. False if one is NaN or not below limit.

    low, high, spoilt: what was found of each lane, for this function alone.
    """
    low[:], high[:], spoilt[:] = ZERO, ZERO, ZERO
    for j in range(0, len(values), 4):
        for n in range(width):
            least, most, mark = _range_of_4(values, j, np.uintp(first + n))
            low[n] = least if least < low[n] else low[n]
            high[n] = most if most > high[n] else high[n]
            spoilt[n] += mark
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
def _overlap(
    values: Float, j: int, lane: np.uintp, per_scale: np.float32, lowest: np.float32, highest: np.float32
) -> tuple[np.float32, np.float32]:
    """w q and q q of one weight and its code."""
    value = values[j, lane]
    code = _code(value, per_scale, lowest, highest)
    return value * code, code * code


@njit(error_model="numpy")
def _overlap_of_2(
    values: Float, j: int, step: int, lane: np.uintp, per_scale: np.float32, lowest: np.float32, highest: np.float32
) -> tuple[np.float32, np.float32]:
    product, square = _overlap(values, j, lane, per_scale, lowest, highest)
    other_product, other_square = _overlap(values, j + step, lane, per_scale, lowest, highest)
    return product + other_product, square + other_square


@njit(error_model="numpy")
def _overlap_of_4(
    values: Float, j: int, step: int, lane: np.uintp, per_scale: np.float32, lowest: np.float32, highest: np.float32
) -> tuple[np.float32, np.float32]:
    product, square = _overlap_of_2(values, j, 2 * step, lane, per_scale, lowest, highest)
    other_product, other_square = _overlap_of_2(values, j + step, 2 * step, lane, per_scale, lowest, highest)
    return product + other_product, square + other_square


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
    """<w, q> in the first row of products (block / 8, lanes), and <q, q>, of values and their codes q.

    <w, q> is summed by halves, which errs less than one after the other; <q, q> is whole, and exact in any order.
    Eight weights are summed in registers: what a sum in memory costs is more than its arithmetic.
    """
    square[:] = ZERO
    size = len(values) // TOGETHER
    for j in range(size):
        for n in range(width):
            lane = np.uintp(first + n)
            product, norm = _overlap_of_4(values, j, 2 * size, lane, per_scale[n], lowest, highest)
            other_product, other_norm = _overlap_of_4(values, j + size, 2 * size, lane, per_scale[n], lowest, highest)
            products[j, n] = product + other_product
            square[n] += norm + other_norm
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
def _unsigned_code(value: np.float32, per_scale: np.float32, lowest: np.float32, highest: np.float32) -> np.uint32:
    """The code as it is stored, from 0 on."""
    return np.uint32(np.int32(_code(value, per_scale, lowest, highest)) - np.int32(lowest))


@njit(error_model="numpy")
def _codes_of_4(
    values: Float,
    j: int,
    lane: np.uintp,
    bits: np.uint32,
    per_scale: np.float32,
    lowest: np.float32,
    highest: np.float32,
) -> np.uint32:
    """Four codes, the first in the lowest bits."""
    one = _unsigned_code(values[j, lane], per_scale, lowest, highest)
    two = _unsigned_code(values[j + 1, lane], per_scale, lowest, highest)
    three = _unsigned_code(values[j + 2, lane], per_scale, lowest, highest)
    four = _unsigned_code(values[j + 3, lane], per_scale, lowest, highest)
    return (one | two << bits) | (three | four << bits) << np.uint32(2) * bits


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
    """words (block * bits / 32, lanes): the values' codes, the first in the lowest bits."""
    for word in range(len(words)):
        if bits == 8:
            for n in range(width):
                lane = np.uintp(first + n)
                words[word, n] = _codes_of_4(values, 4 * word, lane, np.uint32(8), per_scale[n], lowest, highest)
        else:
            for n in range(width):
                lane = np.uintp(first + n)
                low = _codes_of_4(values, 8 * word, lane, np.uint32(4), per_scale[n], lowest, highest)
                high = _codes_of_4(values, 8 * word + 4, lane, np.uint32(4), per_scale[n], lowest, highest)
                words[word, n] = low | high << np.uint32(16)


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
    products = np.zeros((block // TOGETHER, lanes), np.float32)
    codes = np.zeros((blocks, block * bits // WORD, lanes), np.uint32)
    low, high, spoilt = np.zeros(lanes, np.float32), np.zeros(lanes, np.float32), np.zeros(lanes, np.float32)
    good = True
    for first in range(0, outputs, lanes):
        width = min(lanes, outputs - first)
        for k in range(blocks):
            good &= _extremes(values[k], first, width, limit, low, high, spoilt, extreme)
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
            _encode(values[k], first, width, bits, per_scale, lowest, highest, codes[k])
        for n in range(width):  # all of an output at once: a line of memory is written whole
            for k in range(blocks):
                for word in range(codes.shape[1]):
                    words[first + n, k, word] = codes[k, word, n]
    return good
