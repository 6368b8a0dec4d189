"""Block quantization: each block of weights of one output gets the scale of least squared error that was found.

w = (code - 2^(bits-1)) * scale with a float16 scale of either sign: blocks of 32 take 8.5 bits a weight at 8 bits and
4.5 at 4, which is what ggml's q8_0 and q4_0 take. They are nearer to the weights than 64 with a float32 scale, which
take as much. Larger blocks compute faster (benchmarks/bench_decode.py) with more error: activations are quantized in
the same blocks. A zero point for each block (4.625 bits) would take 9 % off the squared error of 4 bits on the demo
pair, and MatMulNBits a third longer for one row: it is left out.
"""

import numpy as np
import torch

from exporter.graph.quantize_kernel import quantize_tile
from exporter.graph.weights import BLOCK

# The largest of a block, whatever its sign, is put at this many steps from zero, in turn, and the best is kept: beyond
# 2^(bits-1) it is clipped and the others get finer steps; before it, the others round differently, which is as good.
# The best three of a grid, on normal, heavy-tailed and trained weights; eight take 2 % more off the error.
REACH = {8: (128.0, 127.0, 126.0), 4: (8.6, 8.0, 7.2)}
# Weights that are float32 at once: few enough for a processor's caches.
TILE, TILE_COLUMNS = 1 << 18, 1 << 9
LARGEST_SCALE = 6e4  # float16 ends at 65504


def quantize_matrix(matrix: torch.Tensor, bits: int, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Quantize W^T (inputs, outputs), any float type, into the layout of MatMulNBits, tile by tile.

    codes uint8 (outputs, ceil(inputs / block), block * bits / 8) and scales float16 (outputs, ceil(inputs / block)) are
    written, codes with the low bits first. Inputs are filled up with zeros to whole blocks. For each reach, codes are
    the rounded multiples, and the scale is refitted to them by least squares: s = <w, q> / <q, q>, whose squared error
    is s^2 <q, q> - 2 s <w, q> + <w, w>, taken for the s that float16 can hold. A block of zeros (or of values too small
    for float16) has the scale 1 and codes of zero. ValueError for values that are not finite, or whose scale is beyond
    float16.
    """
    (inputs, outputs), block = matrix.shape, codes.shape[2] * 8 // bits
    reaches, limit = np.array(REACH[bits], np.float32), np.float32(LARGEST_SCALE * (1 << (bits - 1)))
    width = min(outputs, TILE_COLUMNS * BLOCK // block)
    height = max(1, TILE // (block * width))  # blocks
    words, found = codes.numpy().view(np.uint32), np.empty(scales.shape, np.float32)
    for first in range(0, codes.shape[1], height):
        rows = slice(first * block, min(inputs, (first + height) * block))
        blocks = slice(first, min(codes.shape[1], first + height))
        for column in range(0, outputs, width):
            columns = slice(column, min(outputs, column + width))
            tile = matrix[rows, columns].float()  # as it lies; turning a transposed matrix at once takes much longer
            if missing := -tile.shape[0] % block:
                tile = torch.nn.functional.pad(tile, (0, 0, 0, missing))
            values = tile.contiguous().view(-1, block, tile.shape[1]).numpy()
            place = columns, blocks
            if not quantize_tile(values, reaches, bits, limit, words[place], found[place]):
                raise ValueError(f"a weight is NaN, infinite or beyond {limit:.0f}")
    scales.copy_(torch.from_numpy(found))
