"""Damage one layer, and the report names that layer and the stage that erred."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file

from exporter.parity.bundle_check import Run, verify_bundle
from exporter.parity.elements import round_to
from exporter.parity.oracle import Oracle
from exporter.parity.result import BundleResult
from tests.parity.conftest import Made, open_bundle, replace_tensors, update_manifest

LAYER = 1
Damage = Callable[[Made, Run, Path], None]


def block(name: str, layer: int = LAYER) -> str:
    return f"transformer.h.{layer}.{name}"


def merged_damage(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    def damage(made: Made, run: Run, directory: Path) -> None:
        value = load_file(directory / "model.safetensors")[name]
        replace_tensors(directory, "model.safetensors", {name: change(value)})

    return damage


def unmerge_layer(made: Made, run: Run, directory: Path) -> None:
    name = block("attn.c_attn.weight")
    replace_tensors(directory, "model.safetensors", {name: load_file(made.base / "model.safetensors")[name]})


def round_twice(made: Made, run: Run, directory: Path) -> None:
    """The change is rounded before it is added, as PEFT's safe_merge does it."""
    name = block("attn.c_attn.weight")
    adapted = run.oracle.merge(name.removeprefix("transformer."))
    twice = round_to(adapted.original + round_to(adapted.delta, "F16"), "F16")
    assert (twice != round_to(adapted.merged, "F16")).any()
    replace_tensors(directory, "model.safetensors", {name: torch.from_numpy(twice).half()})


def quantized_damage(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    def damage(made: Made, run: Run, directory: Path) -> None:
        tensors = load_file(directory / "weights.safetensors")
        name = next(n for n in tensors if n.startswith(block(part)) and n.endswith(".scales"))
        replace_tensors(directory, "weights.safetensors", {name: change(tensors[name])})

    return damage


def codes_damage(made: Made, run: Run, directory: Path) -> None:
    """One block of codes is another block's."""
    tensors = load_file(directory / "weights.safetensors")
    name = next(n for n in tensors if n.startswith(block("attn.c_proj.weight")) and ".int" in n and "scales" not in n)
    codes = tensors[name]
    codes[3, 0] = codes[5, 1]
    replace_tensors(directory, "weights.safetensors", {name: codes})


def graph_damage(change: Callable[[onnx.NodeProto], None], kind: str, at: int = LAYER) -> Damage:
    def damage(made: Made, run: Run, directory: Path) -> None:
        model = onnx.load(directory / "model.onnx", load_external_data=False)
        nodes = [node for node in model.graph.node if node.op_type == kind]
        change(nodes[at])
        (directory / "model.onnx").write_bytes(model.SerializeToString())
        update_manifest(directory, "model.onnx")

    return damage


def scale_attention(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.name == "scale":
            attribute.f *= 1.1


def other_activation(node: onnx.NodeProto) -> None:
    node.op_type = "FastGelu"


def replace_a_bias(made: Made, run: Run, directory: Path) -> None:
    """The graph adds another bias than the checkpoint's: the weights in the file are right."""
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    bias = next(one for one in model.graph.initializer if one.name == block("mlp.c_fc.bias"))
    other = np.full(tuple(bias.dims), 0.05, onnx.helper.tensor_dtype_to_np_dtype(bias.data_type))
    bias.CopyFrom(numpy_helper.from_array(other, bias.name))
    (directory / "model.onnx").write_bytes(model.SerializeToString())
    update_manifest(directory, "model.onnx")


def scaled_block(scales: torch.Tensor) -> torch.Tensor:
    scales.view(-1)[7] *= 1.05
    return scales


def moved_bias(bias: torch.Tensor) -> torch.Tensor:
    bias[3] += 0.05
    return bias


CASES: dict[str, tuple[str, Damage, str]] = {
    "weights scaled": ("merged", merged_damage(block("attn.c_attn.weight"), lambda w: (w * 1.05).half()), "merge"),
    "adapter left out": ("merged", unmerge_layer, "merge"),
    "an untouched bias moved": ("merged", merged_damage(block("mlp.c_fc.bias"), moved_bias), "merge"),
    "rounded twice": ("merged", round_twice, "rounding"),
    "a scale of 8 bits": ("int8", quantized_damage("mlp.c_fc.weight", scaled_block), "quantization"),
    "a scale of 4 bits": ("int4", quantized_damage("attn.c_attn.weight", scaled_block), "quantization"),
    "a block of codes": ("int8", codes_damage, "quantization"),
    "attention scaled in the graph": ("merged", graph_damage(scale_attention, "GroupQueryAttention"), "graph"),
    "another activation in the graph": ("merged", graph_damage(other_activation, "BiasGelu"), "graph"),
    "another bias in the graph": ("merged", replace_a_bias, "graph"),
    "attention scaled in a quantized graph": ("int8", graph_damage(scale_attention, "GroupQueryAttention"), "graph"),
}


def verify_damaged(case: str, made: Made, run: Run, directory: Path) -> BundleResult:
    kind, damage, _ = CASES[case]
    shutil.copytree(getattr(made, kind), directory)
    damage(made, run, directory)
    return verify_bundle(run, open_bundle(directory))


@pytest.mark.parametrize("case", CASES)
def test_the_damaged_layer_and_its_stage_are_named(case: str, made: Made, scored: Run, tmp_path: Path) -> None:
    found = verify_damaged(case, made, scored, tmp_path / "bundle")
    assert found.verdict == "FAIL"
    assert found.provenance == "known"  # the manifest was brought in line: only the content tells
    assert found.origin is not None
    assert found.origin.stage == CASES[case][2], found.origin
    assert found.origin.parts == (f"block {LAYER}",), found.origin
    layers = {layer.part: layer for layer in found.layers}
    assert list(layers) == ["embeddings", "block 0", "block 1", "block 2", "head"]
    if found.origin.stage == "graph":
        errors = {part: layer.graph or 0 for part, layer in layers.items()}
        assert max(errors, key=lambda part: errors[part]) == f"block {LAYER}"


@pytest.mark.parametrize("layer", [0, 2])
def test_the_layer_curve_points_at_the_layer(layer: int, made: Made, scored: Run, tmp_path: Path) -> None:
    shutil.copytree(made.merged, tmp_path / "bundle")
    name = block("mlp.c_proj.weight", layer)
    value = load_file(tmp_path / "bundle/model.safetensors")[name]
    replace_tensors(tmp_path / "bundle", "model.safetensors", {name: (value * 0.9).half()})
    found = verify_bundle(scored, open_bundle(tmp_path / "bundle"))
    part = f"block {layer}"
    local = {one.part: one.local or 0 for one in found.layers}
    swap = {one.part: one.swap or 0 for one in found.layers}
    accumulated = [one.accumulated or 0 for one in found.layers]
    assert max(local, key=lambda one: local[one]) == part
    assert max(swap, key=lambda one: swap[one]) == part
    assert swap[part] > 0.99  # putting this layer right takes all of the error away
    assert max(accumulated[: layer + 1]) < 1e-3 * accumulated[layer + 1]
    assert found.origin is not None
    assert found.origin.parts == (part,)


def test_a_right_bundle_has_layers_and_no_origin(made: Made, scored: Run) -> None:
    found = verify_bundle(scored, open_bundle(made.merged))
    assert found.verdict == "PASS"
    assert found.origin is None
    assert all(layer.graph is not None and layer.graph < 1e-9 for layer in found.layers)
    assert all(layer.local is not None and layer.local < 1e-4 for layer in found.layers)


def test_a_quality_that_is_too_low_is_the_quantizations(made: Made, scored: Run) -> None:
    from dataclasses import replace

    strict = tuple(replace(g, limit=1e-9) if g.id == "quality.kl" else g for g in scored.thresholds.gates)
    run = replace(scored, thresholds=replace(scored.thresholds, gates=strict))
    found = verify_bundle(run, open_bundle(made.int4))
    assert found.verdict == "FAIL"
    assert found.origin is not None
    assert found.origin.stage == "quantization"


def test_parts_of_the_oracle_cover_the_model(scored: Run) -> None:
    from exporter.parity.origin import part_of

    oracle: Oracle = scored.oracle
    names = oracle.state_names
    assert part_of("wte.weight", names) == part_of("wpe.weight", names) == "embeddings"
    assert part_of("ln_f.bias", names) == part_of("lm_head.weight", names) == "head"
    assert part_of("h.2.ln_1.weight", names) == "block 2"
