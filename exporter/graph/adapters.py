"""LoRA adapters beside a graph that takes their factors as inputs: one `.onnx_adapter` file each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from exporter.files import partial_path, publish, write_atomically
from exporter.graph.low_rank import factor_names
from exporter.manifest import describe_file

SUFFIX = ".onnx_adapter"
TEMPLATE_SUFFIX = ".chat_template.jinja"
FORMULA = "y = x W + (x A^T) (scale B^T), scale folded into B once, in float32"
VERSION = 1


@dataclass(frozen=True, slots=True)
class RuntimeAdapter:
    """An adapter as its file will hold it.

    factors: float32 A^T (in, r) and scale B^T (r, out) by the graph's name of the module, such as h.0.attn.c_attn.
    facts: the manifest's account of it. template: its own chat template, if it has one.
    """

    name: str
    factors: Mapping[str, tuple[np.ndarray, np.ndarray]]
    facts: Mapping[str, Any]
    template: str | None

    @property
    def file(self) -> str:
        return self.name + SUFFIX


def adapted_modules(adapters: Sequence[RuntimeAdapter]) -> frozenset[str]:
    """What any of them adapts: the graph has inputs for these."""
    return frozenset(module for adapter in adapters for module in adapter.factors)


def adapter_facts(adapters: Sequence[RuntimeAdapter]) -> dict[str, Any]:
    """What the manifest says of adapters that stay apart; nothing where there are none."""
    if not adapters:
        return {}
    listed = {adapter.name: {"file": adapter.file, **adapter.facts} for adapter in adapters}
    return {"adapter_formula": FORMULA, "adapters": listed}


def write_adapters(directory: Path, adapters: Sequence[RuntimeAdapter]) -> dict[str, dict[str, Any]]:
    """One file for each adapter, and its chat template where it has its own; the manifest's entries by file name."""
    files: dict[str, dict[str, Any]] = {}
    for adapter in adapters:
        path = directory / adapter.file
        write_adapter(path, adapter)
        files[path.name] = describe_file(path)
        if adapter.template is not None:
            path = directory / (adapter.name + TEMPLATE_SUFFIX)
            write_atomically(path, adapter.template.encode())
            files[path.name] = describe_file(path)
    return files


def holds_adapter(path: Path, adapter: RuntimeAdapter) -> bool:
    """True if `path` is what `write_adapter` writes: an export that was interrupted left it."""
    try:
        found = ort.AdapterFormat.read_adapter(str(path)).get_parameters()  # pyright: ignore[reportArgumentType]
    except Exception:  # onnxruntime's own exceptions have no common base
        return False
    values = _parameters(adapter)
    return found.keys() == values.keys() and all(
        np.array_equal(value.numpy(), values[name]) for name, value in found.items()
    )


def _parameters(adapter: RuntimeAdapter) -> dict[str, np.ndarray]:
    """The factors by the names of the graph's inputs."""
    return {
        name: factor
        for module, factors in adapter.factors.items()
        for name, factor in zip(factor_names(module), factors, strict=True)
    }


def write_adapter(path: Path, adapter: RuntimeAdapter) -> None:
    """onnxruntime's own format, whole or not at all."""
    values = {name: ort.OrtValue.ortvalue_from_numpy(factor) for name, factor in _parameters(adapter).items()}
    file = ort.AdapterFormat()
    file.set_adapter_version(VERSION)
    file.set_model_version(VERSION)
    file.set_parameters(values)
    partial = partial_path(path)
    try:
        file.export_adapter(str(partial))  # pyright: ignore[reportArgumentType] (annotated PathLike, takes str only)
        publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)
