"""`exporter export --precision int8-exact`: the base's weights as 8-bit loading makes them, the adapters beside them.

Folding an adapter into int8 codes and quantizing again loses most of it: its values are smaller than a step. So every
matrix that LLM.int8 quantizes keeps bitsandbytes' own codes (shifted by 128) and its own row scales absmax / 127, the
scale repeated for each block as MatMulNBits wants it, and an adapter is a float32 product beside it:
y = x W^T + (x A^T) (scale B^T). Everything that 8-bit loading leaves alone stays in its stored type.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from exporter.errors import InputRefused
from exporter.graph.adapter_source import read_runtime_adapter
from exporter.graph.adapters import RuntimeAdapter
from exporter.graph.architectures import read_decoder
from exporter.graph.bundle import GRAPHS, Bundle
from exporter.graph.decoder import Decoder, decoder_weights
from exporter.graph.parts import INT8_EXACT, Parts
from exporter.graph.quantized_file import Stored
from exporter.graph.standalone import write_bundle
from exporter.graph.weights import DOWN, UP
from exporter.merging.card import licence_of, text_files
from exporter.merging.int8 import quantized_modules
from exporter.merging.modules import ModelLayout, model_layout
from exporter.progress import Progress
from exporter.sources.checkpoint import Checkpoint, open_checkpoint
from exporter.sources.hub import Source, resolve
from exporter.sources.tensors import TensorInfo

FORMULA = "y = x W_int8^T + (x A^T) (scale B^T) in float32, W_int8 = code * (absmax * float32(1/127)) of bitsandbytes"


def export_int8_exact(parts: Parts, target: str, progress: Progress) -> Bundle:
    """A bundle in `parts.out` that computes what the unmerged 8-bit PEFT model does, but for activations' rounding.

    Several adapters add up. Raises UsageError (foreign output), InputRefused (anything but LoRA on the quantized
    matrices, by name; weights without codes), EnvironmentLacking.
    """
    source = resolve(parts.base, kind="base", progress=progress)
    sources = [resolve(one, kind="adapter", progress=progress) for one in parts.adapters]
    checkpoint = open_checkpoint(source.directory)
    decoder = read_decoder(checkpoint.config)
    layout = model_layout(checkpoint.directory, checkpoint.config)
    opened = [read_runtime_adapter(one.id or one.directory.name, one, checkpoint, layout, decoder) for one in sources]
    stored = _storage(decoder, checkpoint, layout)
    factors = _factors(opened, stored, decoder)
    bundle = Bundle(parts.out, INT8_EXACT, target, parts.out / GRAPHS[target])
    facts: dict[str, Any] = {
        "provenance": "base and adapters",
        "base": {"source": source.id or str(source.directory), "commit": source.commit},
        "adapters_beside": [{"name": adapter.name, **adapter.facts} for adapter in opened],
        "formula": FORMULA,
        "onto": "int8",
    }
    small = _small_files(source, sources, progress)
    return write_bundle(bundle, checkpoint, stored, small, facts, extra=factors, force=parts.force, progress=progress)


def _storage(decoder: Decoder, checkpoint: Checkpoint, layout: ModelLayout) -> dict[str, Stored]:
    """By checkpoint name: codes for what 8-bit loading converts, everything else as it is stored."""
    codes = {f"{decoder.short(module)}.weight" for module in quantized_modules(layout.model)}
    stored = {}
    for short, info in decoder_weights(decoder, checkpoint.tensors).items():
        assert isinstance(info, TensorInfo), short  # a checkpoint holds nothing quantized
        plain = Stored(info, info.dtype)
        if short in codes and decoder.parameters[short].kind != "conv1d":
            raise InputRefused(
                f"int8-exact of {short!r}, a {decoder.parameters[short].kind} of {decoder.model_class}",
                expected="Conv1D matrices (GPT-2, Cerebras-GPT)",
                todo="export a merged checkpoint with --precision int8",
            )
        stored[info.name] = replace(plain, bits=8, transposed=True, exact=True) if short in codes else plain
    return stored


def _factors(
    adapters: Sequence[RuntimeAdapter], stored: Mapping[str, Stored], decoder: Decoder
) -> dict[str, torch.Tensor]:
    """float32 A^T (in, r) and scale B^T (r, out) by the weight's name: the adapters' side by side along r."""
    names = {decoder.short(name): name for name, one in stored.items() if one.exact}
    factors = {}
    for module in dict.fromkeys(module for adapter in adapters for module in adapter.factors):
        if f"{module}.weight" not in names:
            raise InputRefused(
                f"an adapter changes {module!r}, which 8-bit loading does not quantize",
                expected="LoRA on the matrices of the blocks",
                todo="merge it: exporter merge --onto int8",
            )
        pairs = [adapter.factors[module] for adapter in adapters if module in adapter.factors]
        name = names[f"{module}.weight"]
        factors[name + DOWN] = torch.from_numpy(np.concatenate([down for down, _ in pairs], axis=1))
        factors[name + UP] = torch.from_numpy(np.concatenate([up for _, up in pairs], axis=0))
    return factors


def _small_files(base: Source, adapters: Sequence[Source], progress: Progress) -> dict[str, bytes]:
    """What stands beside the weights, chosen as a merge chooses it."""
    return {
        "config.json": (base.directory / "config.json").read_bytes(),
        **text_files(base, adapters, None, progress),
        "README.md": _card(base, adapters).encode(),
    }


def _card(base: Source, adapters: Sequence[Source]) -> str:
    parts = [("base", base), *(("adapter", one) for one in adapters)]
    rows = [(kind, one.id or one.directory.name, licence_of(one.directory)) for kind, one in parts]
    table = "\n".join(f"| {kind} | {name} | {licence} |" for kind, name, licence in rows)
    return f"""# {rows[0][1]} in 8 bits, with its adapter beside

| part | source | licence |
|---|---|---|
{table}

The terms of **all** of these licences apply. Made by Exporter: {FORMULA}.
"""
