"""Block quantization: each block of weights of one output gets the scale of least squared error that was found.

w = (code - 2^(bits-1)) * scale with a float16 scale of either sign: blocks of 32 take 8.5 bits a weight at 8 bits and
4.5 at 4, which is what ggml's q8_0 and q4_0 take. They are nearer to the weights than 64 with a float32 scale, which
take as much. Larger blocks compute faster (benchmarks/bench_decode.py) with more error: activations are quantized in
the same blocks. A zero point for each block (4.625 bits) would take 9 % off the squared error of 4 bits on the demo
pair, and MatMulNBits a third longer for one row: it is left out.
"""

from dataclasses import dataclass

import torch

from exporter.graph.weights import BLOCK

# The largest of a block, whatever its sign, is put at this many steps from zero, in turn, and the best is kept: beyond
# 2^(bits-1) it is clipped and the others get finer steps; before it, the others round differently, which is as good.
# The best three of a grid, on normal, heavy-tailed and trained weights; eight take 2 % more off the error.
REACH = {8: (128.0, 127.0, 126.0), 4: (8.6, 8.0, 7.2)}
# Weights in work at once: few enough for a processor's caches, enough for torch's time per operation not to matter.
TILE, TILE_COLUMNS = 1 << 19, 1 << 12
LARGEST_SCALE = 6e4  # float16 ends at 65504


@dataclass(frozen=True, slots=True)
class QuantizedBlocks:
    """codes uint8 (K, block, N), unpacked; scales float16 (K, N)."""

    codes: torch.Tensor
    scales: torch.Tensor


def quantize_blocks(values: torch.Tensor, bits: int) -> QuantizedBlocks:
    """float32 (K, block, N), blocks along the second dimension.

    For each reach, codes are the rounded multiples, and the scale is refitted to them by least squares:
    s = <w, q> / <q, q>, whose squared error is s^2 <q, q> - 2 s <w, q> + <w, w>, taken for the s that float16 can hold.
    A block of zeros (or of values too small for float16) has the scale 1 and codes of zero. ValueError for values that
    are not finite, or whose scale is beyond float16.
    """
    half = 1 << (bits - 1)
    low, high = values.amin(1), values.amax(1)  # torch.aminmax along a dimension takes ten times as long
    extreme = torch.where(high > -low, high, low)  # (K, N), signed
    if not (extreme.abs() < LARGEST_SCALE * half).all():
        raise ValueError(f"a weight is NaN, infinite or beyond {LARGEST_SCALE * half:.0f}")
    # The extreme goes to the negative end, which has one step more; below 1e-30 a reciprocal would overflow.
    unit = torch.where(extreme.abs() > 1e-30, -1 / extreme, 0.0)
    scales, errors = torch.zeros_like(extreme), torch.zeros_like(extreme)
    steps, products = torch.empty_like(values), torch.empty_like(values)
    for reach in REACH[bits]:
        torch.mul(values, (unit * reach).unsqueeze(1), out=steps)
        steps.round_()
        if reach > half - 0.5:
            steps.clamp_(-half, half - 1)
        overlap = _sum_blocks(torch.mul(values, steps, out=products))
        square = torch.mul(steps, steps, out=products).sum(1)  # of whole numbers: exact in any order
        scale = (overlap / square).half().float()
        error = scale * (scale * square - 2 * overlap)  # less <w, w>; NaN for a block of zeros, which is never better
        better = error < errors
        scales, errors = torch.where(better, scale, scales), torch.where(better, error, errors)
    inverse = torch.where(scales != 0, 1 / scales, 0.0)
    torch.mul(values, inverse.unsqueeze(1), out=steps)
    steps.round_().clamp_(-half, half - 1)
    codes = steps.to(torch.int8).view(torch.uint8).add_(half)  # a float becomes a signed byte much faster
    return QuantizedBlocks(codes, torch.where(scales != 0, scales, 1.0).half())


def _sum_blocks(values: torch.Tensor) -> torch.Tensor:
    """(K, block, N) to (K, N) by halves, in place: torch's own order of sums depends on the shape and the machine."""
    size = values.shape[1]
    while size > 1:
        size //= 2
        values[:, :size].add_(values[:, size : 2 * size])  # `+=` would copy the sums onto themselves
    return values[:, 0].clone()


def quantize_matrix(matrix: torch.Tensor, bits: int, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Quantize W^T (inputs, outputs), any float type, into the layout of MatMulNBits, tile by tile.

    codes uint8 (outputs, ceil(inputs / block), block * bits / 8) and scales float16 (outputs, ceil(inputs / block)) are
    written. Inputs are filled up with zeros to whole blocks. ValueError as `quantize_blocks`.
    """
    outputs, block = matrix.shape[1], codes.shape[2] * 8 // bits
    width = min(outputs, TILE_COLUMNS * BLOCK // block)
    height = max(1, TILE // (block * width))  # blocks
    for first in range(0, codes.shape[1], height):
        for column in range(0, outputs, width):
            part = matrix[first * block : (first + height) * block, column : column + width].float()
            if missing := -part.shape[0] % block:
                part = torch.nn.functional.pad(part, (0, 0, 0, missing))
            q = quantize_blocks(part.contiguous().view(-1, block, part.shape[1]), bits)
            place = slice(column, column + width), slice(first, first + height)
            packed = pack(q.codes, bits)  # (K, bytes, N)
            rows = packed.view(-1, packed.shape[2]).T.contiguous()  # in two dimensions, which is much faster
            codes[place] = rows.view(-1, *packed.shape[:2])
            scales[place] = q.scales.T


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes (K, block, N) as bytes (K, block * bits / 8, N), low bits first."""
    return codes if bits == 8 else codes[:, 0::2] | (codes[:, 1::2] << 4)
