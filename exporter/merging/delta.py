"""The arithmetic of a merge: pure functions on float32, one per adapter method."""

import torch

from exporter.merging.modules import Orientation

# Smaller blocks of rows change the order in which a matrix product is summed.
ROW_BLOCK = 64


def lora_delta(down: torch.Tensor, up: torch.Tensor, scale: float, orientation: Orientation) -> torch.Tensor:
    """scale * B A (Hu et al., LoRA, 2021, section 4.1), laid out as the weight it is added to.

    down A (r, in) and up B (out, r), float32. Returns (out, in) for "out_in" (Linear), (in, out) for "in_out" (Conv1D).
    """
    product = up @ down  # (out, in)
    if orientation == "in_out":
        product = product.T
    return product * scale


def lora_delta_rows(
    down: torch.Tensor, up: torch.Tensor, scale: float, orientation: Orientation, start: int, stop: int
) -> torch.Tensor:
    """Rows `start` to `stop` of `lora_delta`; `start` is a multiple of ROW_BLOCK."""
    if orientation == "in_out":
        return lora_delta(down[:, start:stop], up, scale, orientation)
    return lora_delta(down, up[start:stop], scale, orientation)


def add_and_round(weight: torch.Tensor, deltas: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """weight + every delta in float32, rounded once to `dtype`. weight (rows, columns) in its stored dtype."""
    total = weight.to(torch.float32)
    for delta in deltas:
        total = total + delta
    return total.to(dtype)
