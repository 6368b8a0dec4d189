"""The one way in which a transformers model is called here: whole documents, unpadded, without a cache."""

from typing import Any

import torch


def forward(model: Any, ids: torch.Tensor) -> Any:
    """What `model` makes of `ids` (B, T), int64, where each row is one whole document.

    The mask says what `generate` says too: every token is one of the document. Left out, transformers looks for
    several documents packed into a row, and builds a (T, T) mask for them in each call: on a small model most of the
    call's time (`find_packed_sequence_indices` in its masking_utils.py).
    """
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
