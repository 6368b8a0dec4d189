"""genai_config.json: what onnxruntime-genai needs to know to run the graph."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exporter.graph.architectures import find_architecture
from exporter.graph.decoder import Sizes
from exporter.sources.checkpoint import read_json
from exporter.sources.stops import listed_stops


def stop_tokens(directory: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end an answer: generation_config.json's before config.json's, else the architecture's default."""
    path = directory / "generation_config.json"
    if listed := listed_stops(read_json(path) if path.is_file() else {}, config):
        return listed
    architecture = find_architecture(config)
    return (architecture.default_stop,) if architecture is not None else ()


def genai_config(directory: Path, config: Mapping[str, Any], sizes: Sizes, graph: str, target: str) -> bytes:
    """`pad_token_id` is the eos id: genai derives its mask from the pad id, and no prompt holds eos inside."""
    stops = stop_tokens(directory, config)
    bos = config.get("bos_token_id")
    providers: Sequence[Mapping[str, Any]] = [{"cuda": {}}] if target == "cuda" else []
    content = {
        "model": {
            "type": "decoder",  # "gpt2" would ask for a cache of key and value in one tensor
            "bos_token_id": bos if isinstance(bos, int) else stops[0],
            "eos_token_id": stops[0] if len(stops) == 1 else list(stops),
            "pad_token_id": stops[0],
            "vocab_size": sizes.vocab_size,
            "context_length": sizes.n_positions,
            "decoder": {
                "filename": graph,
                "session_options": {"provider_options": providers},
                "head_size": sizes.head_size,
                "hidden_size": sizes.hidden_size,
                "num_attention_heads": sizes.n_head,
                "num_key_value_heads": sizes.n_head,
                "num_hidden_layers": sizes.n_layer,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": sizes.n_positions,
            "min_length": 0,
            "num_beams": 1,
            "past_present_share_buffer": True,
        },
    }
    return (json.dumps(content, indent=2) + "\n").encode()
