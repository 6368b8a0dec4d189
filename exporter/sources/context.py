"""The longest input that a model takes, by its config.json."""

from collections.abc import Mapping
from typing import Any

CONTEXT_KEYS = ("n_positions", "max_position_embeddings", "n_ctx", "max_seq_len", "seq_length")
# ALiBi has no table of positions, and its config.json need not name a length: what these models were trained on.
TRAINED_ON = {"bloom": 2048, "mpt": 2048}


def context_length(config: Mapping[str, Any]) -> int | None:
    """In tokens; None where config.json does not say it."""
    named = (config.get(key) for key in CONTEXT_KEYS)
    found = (value for value in named if isinstance(value, int) and not isinstance(value, bool))
    return next(found, TRAINED_ON.get(str(config.get("model_type"))))
