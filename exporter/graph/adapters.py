"""LoRA adapters beside a graph that takes their factors as inputs: one `.onnx_adapter` file each."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch

from exporter.errors import InputRefused, UsageError
from exporter.files import partial_path, publish, write_atomically
from exporter.graph.gpt2 import PREFIX, expected_shapes
from exporter.graph.gpt2_config import Gpt2Config
from exporter.graph.low_rank import factor_names
from exporter.manifest import describe_file
from exporter.merging.changes import LowRank
from exporter.merging.delta import read_factors
from exporter.merging.lora import lora_changes
from exporter.merging.modules import ModelLayout
from exporter.prompts import chat_template
from exporter.sources.adapter import LORA, open_adapter
from exporter.sources.hub import Source

SUFFIX = ".onnx_adapter"
TEMPLATE_SUFFIX = ".chat_template.jinja"
NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}")
FORMULA = "y = x W + (x A^T) (scale B^T), scale folded into B once, in float32"
VERSION = 1


@dataclass(frozen=True, slots=True)
class RuntimeAdapter:
    """`factors` by the graph's name of the module they adapt, such as h.0.attn.c_attn."""

    name: str
    source: Source
    factors: Mapping[str, LowRank]

    @property
    def file(self) -> str:
        return self.name + SUFFIX

    def describe(self) -> dict[str, Any]:
        """The manifest's account of it."""
        ranks = {module: [factor.rank, factor.scale] for module, factor in sorted(self.factors.items())}
        origin = {"source": self.source.id or str(self.source.directory), "commit": self.source.commit}
        return {"file": self.file, **origin, "rank_and_scale": ranks}


def read_runtime_adapter(name: str, source: Source, layout: ModelLayout, config: Gpt2Config) -> RuntimeAdapter:
    """An adapter whose whole effect is low-rank sums in the decoder's matrices or in the head; else InputRefused.

    Every tensor of its file is consumed or refused by name. Headers only.
    """
    adapter = open_adapter(source.directory)
    if adapter.method != LORA or adapter.config.get("target_parameters"):
        what = "target_parameters" if adapter.method == LORA else adapter.method
        raise _not_separable(name, what)
    changes, consumed = lora_changes(adapter, 1.0, layout, {})
    if rest := sorted(set(adapter.tensors) - consumed):
        raise _not_separable(name, f"the tensor {rest[0]!r}")
    shapes = expected_shapes(config) | {"lm_head.weight": (config.vocab_size, config.n_embd)}
    factors: dict[str, LowRank] = {}
    for tensor, (change, *more) in changes.items():
        module = tensor.removeprefix(PREFIX).removesuffix(".weight")
        if more or not isinstance(change, LowRank) or not is_separable(module):
            raise _not_separable(name, f"{type(change).__name__} of {tensor!r}")
        inputs, outputs = shapes[f"{module}.weight"][:: 1 if change.orientation == "in_out" else -1]
        if (change.down.shape[1], change.up.shape[0]) != (inputs, outputs):
            raise InputRefused(
                f"{name}: {module} has factors of shape {list(change.down.shape)} and {list(change.up.shape)}",
                expected=f"{inputs} inputs and {outputs} outputs, as in the base",
                todo="this adapter was trained on another base; check base_model_name_or_path",
            )
        factors[module] = change
    if not factors:
        raise InputRefused(f"{source.directory} changes no tensor of the base", expected="an adapter for this base")
    return RuntimeAdapter(name, source, factors)


def is_separable(module: str) -> bool:
    """True for a matrix of the decoder and for the head."""
    return module == "lm_head" or re.fullmatch(r"h\.\d+\.(attn|mlp)\.(c_attn|c_proj|c_fc)", module) is not None


def _not_separable(name: str, what: str) -> InputRefused:
    return InputRefused(
        f"the adapter {name} cannot stay apart from its base: it holds {what}",
        expected="LoRA on attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj or lm_head, and nothing else",
        todo="merge it: exporter merge",
    )


def adapted_modules(adapters: Sequence[RuntimeAdapter]) -> frozenset[str]:
    """What any of them adapts: the graph has inputs for these."""
    return frozenset(module for adapter in adapters for module in adapter.factors)


def write_adapters(directory: Path, adapters: Sequence[RuntimeAdapter]) -> dict[str, dict[str, Any]]:
    """One file for each adapter, and its chat template where it has its own; the manifest's entries by file name."""
    files: dict[str, dict[str, Any]] = {}
    for adapter in adapters:
        path = directory / adapter.file
        write_adapter(path, adapter)
        files[path.name] = describe_file(path)
        if (template := chat_template(adapter.source.directory)) is not None:
            path = directory / (adapter.name + TEMPLATE_SUFFIX)
            write_atomically(path, template.encode())
            files[path.name] = describe_file(path)
    return files


def graph_factors(adapter: RuntimeAdapter) -> dict[str, torch.Tensor]:
    """float32 A^T (in, r) and scale B^T (r, out) of each module, by the graph's input names.

    InputRefused for values that are not finite, and if nothing of the adapter would do anything.
    """
    found: dict[str, torch.Tensor] = {}
    effective = False
    for module, factor in adapter.factors.items():
        down, up = read_factors(factor)
        effective |= bool(down.any() and up.any())
        scaled = up.T * factor.scale
        if not torch.isfinite(scaled).all():
            raise InputRefused(
                f"{adapter.name}: the scale {factor.scale:g} times B of {module} overflows in float32",
                expected="finite factors",
            )
        found |= zip(factor_names(module), (down.T.contiguous(), scaled.contiguous()), strict=True)
    if not effective:
        raise InputRefused(
            f"every factor B (or A) of the adapter {adapter.name} is zero, so it would change nothing",
            expected="a trained adapter",
            todo="check that training ran and that the right checkpoint was saved",
        )
    return found


def write_adapter(path: Path, adapter: RuntimeAdapter) -> None:
    """onnxruntime's own format, whole or not at all. InputRefused as `graph_factors`."""
    factors = graph_factors(adapter)
    file = ort.AdapterFormat()
    file.set_adapter_version(VERSION)
    file.set_model_version(VERSION)
    values = {name: ort.OrtValue.ortvalue_from_numpy(tensor.numpy()) for name, tensor in factors.items()}
    file.set_parameters(values)  # `values` own the arrays until the file is written
    partial = partial_path(path)
    try:
        file.export_adapter(str(partial))  # pyright: ignore[reportArgumentType] (annotated PathLike, takes str only)
        publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def split_name(given: str | Path) -> tuple[str | None, str | Path]:
    """`NAME=SOURCE` as its parts; a source without a name as (None, source)."""
    name, found, source = str(given).partition("=")
    if found and NAME.fullmatch(name) and source and not Path(given).exists():
        return name, source
    return None, given


def unique_names(names: Sequence[str]) -> None:
    """UsageError unless the names of the adapters can tell them apart, and can be names of files."""
    for name in names:
        if not NAME.fullmatch(name):
            raise UsageError(f"the adapter name {name!r}", expected="letters, digits, '.', '_', '-'", todo=RENAME)
        if names.count(name) > 1:
            raise UsageError(f"two adapters named {name}", expected="one name for each", todo=RENAME)


RENAME = "name it: --adapter NAME=DIRECTORY"
