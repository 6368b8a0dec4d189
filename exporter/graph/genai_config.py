"""genai_config.json: what onnxruntime-genai needs to know to run the graph."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exporter.graph.gpt2_config import Gpt2Config
from exporter.sources.checkpoint import read_json

DEFAULT_TOKEN = 50256  # transformers' GPT2Config: bos and eos where neither file names one


def stop_tokens(directory: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end an answer: generation_config.json's before config.json's."""
    values: list[Any] = []
    if (directory / "generation_config.json").is_file():
        values.append(read_json(directory / "generation_config.json").get("eos_token_id"))
    values += [config.get("eos_token_id"), DEFAULT_TOKEN]
    for value in values:
        ids = value if isinstance(value, list) else [value]
        if ids and all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
            return tuple(ids)
    return (DEFAULT_TOKEN,)


def genai_config(directory: Path, config: Mapping[str, Any], gpt2: Gpt2Config, graph: str, target: str) -> bytes:
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
            "vocab_size": gpt2.vocab_size,
            "context_length": gpt2.n_positions,
            "decoder": {
                "filename": graph,
                "session_options": {"provider_options": providers},
                "head_size": gpt2.head_size,
                "hidden_size": gpt2.n_embd,
                "num_attention_heads": gpt2.n_head,
                "num_key_value_heads": gpt2.n_head,
                "num_hidden_layers": gpt2.n_layer,
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
            "max_length": gpt2.n_positions,
            "min_length": 0,
            "num_beams": 1,
            "past_present_share_buffer": True,
        },
    }
    return (json.dumps(content, indent=2) + "\n").encode()
