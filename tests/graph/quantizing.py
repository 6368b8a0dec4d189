"""What the export makes of blocks of weights that stand alone, one output a block."""

import torch

from exporter.graph.dequantize import unpack
from exporter.graph.quantize import quantize_matrix


def quantized(blocks: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """codes uint8 (n, block), unpacked, and scales float16 (n,) of values (n, block)."""
    count, block = blocks.shape
    codes = torch.empty(count, 1, block * bits // 8, dtype=torch.uint8)
    scales = torch.empty(count, 1, dtype=torch.float16)
    quantize_matrix(blocks.T, bits, codes, scales)
    return unpack(codes, bits)[:, 0], scales[:, 0]


def restored(blocks: torch.Tensor, bits: int) -> torch.Tensor:
    """What stands for values (n, block) in a bundle, float32."""
    codes, scales = quantized(blocks, bits)
    return (codes.float() - (1 << (bits - 1))) * scales.float().unsqueeze(1)
