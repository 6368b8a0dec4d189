"""Block quantization: each block of 32 weights gets the scale (and zero point) of least squared error."""

from dataclasses import dataclass

import torch

BLOCK = 32
# How far a block's range may shrink: a clipped outlier buys finer steps for the other 31 weights.
SHRINK = {4: (1.0, 0.9, 0.8, 0.7), 8: (1.0,)}
# Rounds of "codes for the scale, then the scale for the codes": with the four ranges, as good as a search over 625.
ROUNDS = 2


@dataclass(frozen=True, slots=True)
class QuantizedBlocks:
    """codes uint8 (..., BLOCK), unpacked; scales float32 (...); zero_points uint8 (...) or None for 2^(bits-1)."""

    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None


def quantize_blocks(values: torch.Tensor, bits: int, scale_dtype: torch.dtype) -> QuantizedBlocks:
    """`values` float32 (..., BLOCK); w = (code - zero_point) * scale with scales that `scale_dtype` can hold.

    8 bits: symmetric about 128. 4 bits: with a zero point; the range that holds all values is shrunk step by step
    and the best step is kept, block by block. Last, the scale is refitted to the chosen codes by least squares.
    """
    symmetric = bits == 8
    top = (1 << bits) - 1
    low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
    best: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    best_error = torch.full_like(low, torch.inf)
    for shrink in SHRINK[bits]:
        if symmetric:
            scale = _storable(torch.maximum(-low, high) * (shrink / (top >> 1)), scale_dtype)
            zero = torch.full_like(scale, float((top + 1) >> 1))
        else:
            scale = _storable((high - low) * (shrink / top), scale_dtype)
            zero = (-low * shrink / scale).round().clamp(0, top)
        codes = values
        for _ in range(ROUNDS):
            codes = (values / scale.unsqueeze(-1)).round_().add_(zero.unsqueeze(-1)).clamp_(0, top)
            scale = _refit(values, codes, zero, scale, scale_dtype)
        error = _squared_error(values, codes, zero, scale)
        if best is None:
            best, best_error = (codes, scale, zero), error
        else:
            better = error < best_error
            best = (
                torch.where(better.unsqueeze(-1), codes, best[0]),
                torch.where(better, scale, best[1]),
                torch.where(better, zero, best[2]),
            )
            best_error = torch.where(better, error, best_error)
    assert best is not None
    codes, scale, zero = best
    return QuantizedBlocks(codes.to(torch.uint8), scale, None if symmetric else zero.to(torch.uint8))


def _storable(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As it will be stored; 1 for a block of zeros (or of values too small for the type), whose codes are then zero."""
    scale = scale.to(dtype).float()
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _refit(
    values: torch.Tensor, codes: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The scale that minimises sum((values - (codes - zero) * scale)^2): <values, steps> / <steps, steps>."""
    steps = codes - zero.unsqueeze(-1)
    square = steps.square().sum(-1)
    fitted = ((values * steps).sum(-1) / square.clamp(min=1)).to(dtype).float()
    return torch.where((square > 0) & (fitted > 0), fitted, scale)


def _squared_error(values: torch.Tensor, codes: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return ((codes - zero.unsqueeze(-1)) * scale.unsqueeze(-1) - values).square_().sum(-1)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes (..., n) as bytes (..., ceil(n * bits / 8)), low bits first."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., 0::2] | (codes[..., 1::2] << 4)
