"""ggml's q8_0 and q4_0 by their published formulas (ggml-quants.c, quantize_row_q8_0_ref and quantize_row_q4_0_ref)."""

import numpy as np

BLOCK = 32


def q8_0(blocks: np.ndarray) -> np.ndarray:
    """float32 (n, 32) as 8.5 bits a weight give them back: d = amax / 127 kept in float16, q = round(x / d)."""
    d = np.abs(blocks).max(1, keepdims=True) / 127
    q = _half_away(np.divide(blocks, d, out=np.zeros_like(blocks), where=d > 0))
    return q * d.astype(np.float16).astype(np.float32)


def q4_0(blocks: np.ndarray) -> np.ndarray:
    """4.5 bits a weight: d = (the value of largest magnitude) / -8 in float16, q = min(15, trunc(x / d + 8.5))."""
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    d = extreme / -8
    q = np.minimum(15, np.trunc(np.divide(blocks, d, out=np.zeros_like(blocks), where=d != 0) + 8.5))
    return (q - 8) * d.astype(np.float16).astype(np.float32)


def rounded_to_nearest(blocks: np.ndarray, bits: int) -> np.ndarray:
    """The plain way: a float16 scale that puts the largest magnitude on the last positive step."""
    last = (1 << (bits - 1)) - 1
    d = np.abs(blocks).max(1, keepdims=True) / last
    d = np.where(d > 0, d, 1).astype(np.float16).astype(np.float32)
    return np.clip(np.round(blocks / d), -last - 1, last) * d


def _half_away(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.floor(np.abs(x) + 0.5)
