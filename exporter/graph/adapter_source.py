"""A PEFT adapter as factors that stand beside a graph's matrices, or why it cannot stay apart from its base."""

import re

import numpy as np
import torch

from exporter.errors import InputRefused
from exporter.files import sha256_file
from exporter.graph.adapters import RuntimeAdapter
from exporter.graph.decoder import Decoder
from exporter.merging.changes import LowRank
from exporter.merging.delta import read_factors
from exporter.merging.lora import lora_changes
from exporter.merging.modules import ModelLayout, find_name
from exporter.merging.saved import INSERTED
from exporter.prompts import chat_template
from exporter.sources.adapter import CONFIG, LORA, open_adapter
from exporter.sources.checkpoint import Checkpoint
from exporter.sources.hub import Source
from exporter.sources.tensors import TensorInfo, equal_bytes
from exporter.sources.values import read_tensor


def read_runtime_adapter(
    name: str, source: Source, base: Checkpoint, layout: ModelLayout, decoder: Decoder
) -> RuntimeAdapter:
    """An adapter whose whole effect is low-rank sums in the decoder's matrices or in the head; else InputRefused.

    base: what the adapter was trained on; its embeddings may stand in the adapter's file, as PEFT saves them. Every
    tensor of the file is consumed or refused by name, and so are values that are not finite or do nothing.
    """
    adapter = open_adapter(source.directory)
    if adapter.method != LORA or adapter.config.get("target_parameters"):
        what = "target_parameters" if adapter.method == LORA else f"a {adapter.method} method"
        raise _not_separable(name, what, decoder)
    changes, consumed = lora_changes(adapter, 1.0, layout, {})
    rest = sorted(set(adapter.tensors) - consumed)
    if rest := [one for one in rest if not _is_the_bases_embedding(one, adapter.tensors[one], base, layout)]:
        raise _not_separable(name, f"the tensor {rest[0]!r}", decoder)
    adaptable = decoder.adaptable
    low_rank: dict[str, LowRank] = {}
    for tensor, (change, *more) in sorted(changes.items()):
        module = decoder.short(tensor).removesuffix(".weight")
        if more or not isinstance(change, LowRank) or module not in adaptable:
            raise _not_separable(name, f"{type(change).__name__} of {tensor!r}", decoder)
        inputs, outputs = adaptable[module].inputs_outputs
        if (change.down.shape[1], change.up.shape[0]) != (inputs, outputs):
            raise InputRefused(
                f"{name}: {module} has factors of shape {list(change.down.shape)} and {list(change.up.shape)}",
                expected=f"{inputs} inputs and {outputs} outputs, as in the base",
                todo="this adapter was trained on another base; check base_model_name_or_path",
            )
        low_rank[module] = change
    factors = {module: _folded(change) for module, change in low_rank.items()}
    if not any(down.any() and up.any() for down, up in factors.values()):
        raise InputRefused(
            f"every factor B (or A) of the adapter {name} is zero, or there is none, so it would change nothing",
            expected="a trained adapter",
            todo="check that training ran and that the right checkpoint was saved",
        )
    facts = {
        "source": source.id or str(source.directory),
        "commit": source.commit,
        "files": {path.name: sha256_file(path) for path in (adapter.file, adapter.directory / CONFIG)},
        "rank_and_scale": {module: [change.rank, change.scale] for module, change in low_rank.items()},
    }
    return RuntimeAdapter(name, factors, facts, chat_template(source.directory))


def _is_the_bases_embedding(name: str, info: TensorInfo, base: Checkpoint, layout: ModelLayout) -> bool:
    """PEFT saves embedding and head beside the factors if either is adapted, as they were (`save_embedding_layers`)."""
    known = {f"{module}.weight": () for module in (layout.input_embedding, layout.output_embedding) if module}
    target = find_name(INSERTED.sub("", name), known, layout.prefix)
    stored = target and find_name(layout.tied.get(target, target), base.tensors, layout.prefix)
    if not stored or info.shape != base.tensors[stored].shape:
        return False
    return equal_bytes(info, base.tensors[stored]) or torch.equal(
        read_tensor(info).float(), read_tensor(base.tensors[stored]).float()
    )


def _folded(change: LowRank) -> tuple[np.ndarray, np.ndarray]:
    """float32 A^T (in, r) and scale B^T (r, out), rounded once."""
    down, up = read_factors(change)
    scaled = up.T * change.scale
    if not torch.isfinite(scaled).all():
        raise InputRefused(
            f"the scale {change.scale:g} times {change.up.name!r} overflows in float32", expected="finite factors"
        )
    return down.T.contiguous().numpy(), scaled.contiguous().numpy()


def _not_separable(name: str, what: str, decoder: Decoder) -> InputRefused:
    modules = dict.fromkeys(re.sub(r".*\.\d+\.", "", module) for module in decoder.adaptable)
    return InputRefused(
        f"the adapter {name} cannot stay apart from its base: it holds {what}",
        expected=f"LoRA on {', '.join(modules)}, and nothing else",
        todo="merge it: exporter merge",
    )
