"""The attention with which transformers does what config.json says.

Its default for GPT-2, sdpa, leaves out the options that change the scores (GPT2Attention.forward in transformers 4.57's
modeling_gpt2.py, which gives sdpa no scale of its own); its eager attention honours them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.sources.checkpoint import read_json

# Options of GPT2Config, and the value at which sdpa and eager agree.
PLAIN_SCORES = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}


def attention_of(directory: Path) -> str | None:
    """What to give transformers as `attn_implementation`; None is its default."""
    return "eager" if _left_out(read_json(directory / "config.json")) else None


def attention_notes(config: Mapping[str, Any]) -> list[str]:
    """What whoever runs the merged checkpoint in transformers has to know."""
    return [
        f"config.json sets {name}, which transformers' default attention leaves out: every model here runs with "
        "attn_implementation='eager', and so has to whoever runs the merged checkpoint in transformers"
        for name in _left_out(config)
    ]


def _left_out(config: Mapping[str, Any]) -> list[str]:
    if config.get("model_type") != "gpt2":
        return []
    return [name for name, plain in PLAIN_SCORES.items() if config.get(name, plain) != plain]
