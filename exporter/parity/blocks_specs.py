"""Where the weights of T, M32, B and F come from when they are run block by block."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from exporter.graph.dequantize import dequantize
from exporter.graph.weights import Quantized, Weight
from exporter.parity.bases import BaseOptions
from exporter.parity.blocks import BlockModel, BlockSpec, Values
from exporter.parity.models import attach_adapters, merge_adapters
from exporter.sources.checkpoint import Checkpoint
from exporter.sources.values import read_tensor

Adapters = Sequence[tuple[Path, float]]


def base_blocks(base: Checkpoint, options: BaseOptions) -> BlockModel:
    """B: the base without the adapter."""
    return BlockModel(BlockSpec(base.directory, stored_values(base.tensors), options))


def truth_blocks(base: Checkpoint, adapters: Adapters, options: BaseOptions) -> BlockModel:
    """T: the adapters unmerged, as PEFT runs them; onto int8, D."""
    values = stored_values(base.tensors)
    return BlockModel(BlockSpec(base.directory, values, options, lambda model: attach_adapters(model, adapters)))


def merged_blocks(base: Checkpoint, adapters: Adapters, options: BaseOptions) -> BlockModel:
    """M32: PEFT's own merge of each part in fp32."""
    values = stored_values(base.tensors)

    def attach(model: Any) -> Any:
        return attach_adapters(model, adapters)

    def merge(model: Any) -> Any:
        return merge_adapters(model, len(adapters))

    return BlockModel(BlockSpec(base.directory, values, options, attach, merge))


def carried_blocks(directory: Path, weights: Mapping[str, Weight]) -> BlockModel:
    """F: transformers over the weights of a bundle, dequantized; `directory` holds its config.json."""
    return BlockModel(BlockSpec(directory, stored_values(weights), BaseOptions()))


def stored_values(weights: Mapping[str, Weight]) -> Values:
    """Weights as they are stored, read when they are asked for; quantized ones as what they mean."""

    def value(name: str) -> torch.Tensor | None:
        weight = weights.get(name)
        if weight is None:
            return None
        return dequantize(weight) if isinstance(weight, Quantized) else read_tensor(weight)

    return value
