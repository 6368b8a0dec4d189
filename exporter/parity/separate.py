"""A bundle whose adapters stand apart: the one that is verified is found by its digest and takes part in everything."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from safetensors.torch import save_file

from exporter.errors import InputRefused
from exporter.graph.architectures import read_decoder
from exporter.graph.bundle import bundles_in
from exporter.graph.low_rank import factor_names
from exporter.graph.weights import DOWN, UP, Quantized, Weight
from exporter.parity.bundles import Bundle, SeparateAdapter
from exporter.parity.inputs import Pair
from exporter.runtime.adapters import checked_adapter_file
from exporter.sources.checkpoint import read_json
from exporter.sources.safetensors_file import read_header
from exporter.sources.values import read_tensor


def find_adapter(bundle: Bundle, pair: Pair) -> SeparateAdapter | None:
    """The bundle's copy of the adapter that is verified; None for a bundle without adapters beside it.

    InputRefused unless exactly one that its manifest lists was made of the adapter's very files.
    """
    exported = next((one for one in bundles_in(bundle.directory) if one.graph == bundle.graph), None)
    listed = (exported.section.get("adapters") if exported else None) or {}
    if exported is None or not listed:
        return None
    wanted = {name.removeprefix("0/"): digest for name, digest in pair.adapter_files.items()}
    names = [name for name, facts in listed.items() if facts.get("files") == wanted]
    if len(names) != 1 or [weight for _, weight in pair.weighted] != [1.0]:
        raise InputRefused(
            f"{len(names)} of the adapters beside {bundle.graph} ({', '.join(sorted(listed))}) were made of what is "
            f"verified ({', '.join(f'{path.name} x {weight:g}' for path, weight in pair.weighted)})",
            expected="exactly one, from one adapter with weight 1",
            todo="verify with an adapter that was exported into this bundle, or export it again",
        )
    path: Any = str(checked_adapter_file(exported, names[0]))  # annotated PathLike, takes str only
    try:
        found = ort.AdapterFormat.read_adapter(path).get_parameters()
    except Exception as error:  # onnxruntime's own exceptions have no common base
        raise InputRefused(f"{path} cannot be read: {str(error)[:200]}", todo="export again") from error
    factors = {name: np.array(value.numpy()) for name, value in found.items()}  # copies: the file is not kept open
    return SeparateAdapter(names[0], exported, factors)


def with_adapters(bundles: Sequence[Bundle], adapters: Sequence[SeparateAdapter | None], scratch: Path) -> list[Bundle]:
    """Each bundle as it computes with its adapter, if it has one."""
    both = enumerate(zip(bundles, adapters, strict=True))
    return [with_adapter(bundle, adapter, scratch / f"adapter-{i}") for i, (bundle, adapter) in both]


def with_adapter(bundle: Bundle, adapter: SeparateAdapter | None, scratch: Path) -> Bundle:
    """The bundle as it computes with the adapter; the weights that it changes lie in `scratch`, which is made.

    They are W + A B in float32, or codes with the factors beside them.
    """
    if adapter is None:
        return bundle
    scratch.mkdir(parents=True, exist_ok=True)
    decoder = read_decoder(read_json(bundle.directory / "config.json"))
    stored = {decoder.short(name): name for name in bundle.weights}
    weights = dict(bundle.weights)
    for module, parameter in decoder.adaptable.items():
        names = factor_names(module)
        if names[0] not in adapter.factors:
            continue
        name = stored.get(f"{module}.weight")
        if name is None:
            raise InputRefused(
                f"the adapter {adapter.name} changes {module}, which is tied to the embedding",
                expected="an adapter of the blocks' matrices, or an untied head",
                todo="merge the adapter and verify the merged checkpoint",
            )
        down, up = (torch.from_numpy(adapter.factors[one]) for one in names)
        file = scratch / f"{module}.safetensors"
        weights[name] = _changed(weights[name], down, up, file, turned=parameter.kind != "conv1d")
    return replace(bundle, weights=weights, adapter=adapter)


def _changed(weight: Weight, down: torch.Tensor, up: torch.Tensor, file: Path, *, turned: bool) -> Weight:
    """W + A B of float32 A (in, r) and B (r, out), summed in float64 and rounded once; W is (out, in) if `turned`."""
    if isinstance(weight, Quantized):
        save_file({weight.name + DOWN: down, weight.name + UP: up}, file)
        header = read_header(file)[0]
        return replace(weight, down=header[weight.name + DOWN], up=header[weight.name + UP])
    product = down.double() @ up.double()
    changed = read_tensor(weight).double() + (product.T if turned else product)
    save_file({weight.name: changed.float().contiguous()}, file)
    return read_header(file)[0][weight.name]
