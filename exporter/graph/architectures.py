"""The architectures with a builder of their own: each is one file and one line here."""

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from exporter.errors import InputRefused
from exporter.graph.builder import GraphBuilder, model_of
from exporter.graph.components import Components
from exporter.graph.decoder import Architecture, Decoder, decoder_weights
from exporter.graph.gpt2 import GPT2
from exporter.graph.gpt_neox import GPT_NEOX
from exporter.graph.weights import Weight
from exporter.sources.checkpoint import check_counts

ARCHITECTURES: tuple[Architecture, ...] = (GPT2, GPT_NEOX)
SUPPORTED = ", ".join(f"{one.model_type} ({one.title})" for one in ARCHITECTURES)


def find_architecture(config: Mapping[str, Any]) -> Architecture | None:
    """By config.json's model_type."""
    return next((one for one in ARCHITECTURES if one.model_type == config.get("model_type")), None)


def read_decoder(config: Mapping[str, Any]) -> Decoder:
    """What config.json describes. InputRefused by name for an architecture or an option that has no graph here."""
    architecture = find_architecture(config)
    if architecture is None:
        raise InputRefused(
            f"no native builder for model_type {config.get('model_type')!r}",
            expected=SUPPORTED,
            todo="export with --builder optimum",
        )
    check_counts("config.json", config, 0)  # each layer is walked before the weights can show that it is missing
    return architecture.read(config)


def build_model(
    decoder: Decoder,
    weights: Mapping[str, Weight],
    target: str,
    metadata: dict[str, str],
    *,
    accuracy_level: int = 0,
    adapted: frozenset[str] = frozenset(),
) -> ir.Model:
    """The graph over `weights` (checkpoint names, with or without prefix). Raises InputRefused; reads no weight."""
    components = Components(GraphBuilder(), decoder_weights(decoder, weights), target, accuracy_level, adapted)
    return model_of(decoder.build(components), metadata)
