"""Which inputs LLM.int8 treats apart (Dettmers et al., LLM.int8(), 2022, section 3): a part of what the reference is.

A column of a layer's input with any |x| above the threshold is multiplied in 16 bits. The columns of a call are the
union over its tokens, so they depend on the document: the first one stands for the run.
"""

from collections.abc import Sequence
from typing import Any

import torch

from exporter.parity.forward import forward

OUTLIERS = "outliers in the first document"  # in a reference's environment


@torch.inference_mode()
def count_outlier_columns(model: Any, token_ids: Sequence[int]) -> str:
    """Of the 8-bit layers' inputs during one unpadded pass, such as "14 of 4608 columns, in 5 of 36 layers"."""
    from bitsandbytes.nn.modules import Linear8bitLt

    counts: list[tuple[int, int]] = []

    def count(layer: Any, given: tuple[torch.Tensor, ...]) -> None:
        columns = (given[0].detach().abs() > layer.state.threshold).reshape(-1, given[0].shape[-1]).any(0)
        counts.append((int(columns.sum()), len(columns)))

    layers = [module for module in model.modules() if isinstance(module, Linear8bitLt)]
    hooks = [layer.register_forward_pre_hook(count) for layer in layers]
    try:
        forward(model, torch.tensor([list(token_ids)], device=model.device))
    finally:
        for hook in hooks:
            hook.remove()
    outliers, inputs = sum(found for found, _ in counts), sum(size for _, size in counts)
    return f"{outliers} of {inputs} columns, in {sum(found > 0 for found, _ in counts)} of {len(counts)} layers"
