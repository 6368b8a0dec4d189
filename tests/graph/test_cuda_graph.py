"""Graphs for CUDA: here every node against the types that the provider's documentation lists; on a GPU, numbers too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from exporter.graph.bundle import Bundle
from exporter.graph.export import export
from exporter.runtime.load import load
from exporter.runtime.session import cuda_is_usable
from tests.graph.conftest import TinyModel, tiny_model, tokens
from tests.graph.test_adapters import make_adapter
from tests.graph.test_gpt_neox import tiny_neox
from tests.pairs import gpt2_config, lora_config, make_pair

PRECISIONS = ("native", "fp32", "fp16", "int8", "int4", "separate", "int8-exact")
HALF, SINGLE, WHOLE, INT, BYTE = "float16", "float", "int64", "int32", "uint8"
FLOATS = {HALF, SINGLE, "bfloat16"}
ANY = FLOATS | {WHOLE, INT, BYTE, "bool", "double"}
COUNTS = FLOATS | {"double", INT, WHOLE}
# onnxruntime's docs/OperatorKernels.md, CUDAExecutionProvider, the rows that hold for opset 21, as read at 001d12d of
# its repository: types by input, in order. A node without a kernel would run on the CPU, with a copy on either side.
CUDA_KERNELS: dict[str, tuple[set[str], ...]] = {
    "Add": (COUNTS, COUNTS),
    "Cast": (ANY,),
    "Gather": (ANY, {INT, WHOLE}),
    "LayerNormalization": (FLOATS, FLOATS, FLOATS),
    "MatMul": (FLOATS, FLOATS),
    "Neg": (COUNTS,),
    "ReduceSum": (COUNTS, {WHOLE}),
    "Relu": (FLOATS,),
    "Reshape": (ANY, {WHOLE}),
    "Shape": (ANY,),
    "Slice": (ANY, {INT, WHOLE}, {INT, WHOLE}, {INT, WHOLE}, {INT, WHOLE}),
    "Split": (ANY, {WHOLE}),
    "Squeeze": (ANY, {WHOLE}),
    "Sub": (COUNTS, COUNTS),
    "com.microsoft.BiasGelu": (FLOATS, FLOATS),
    "com.microsoft.FastGelu": (FLOATS, FLOATS),
    "com.microsoft.FusedMatMul": (FLOATS, FLOATS),
    "com.microsoft.GatherBlockQuantized": ({BYTE}, {INT, WHOLE}, FLOATS),
    "com.microsoft.GroupQueryAttention": (*[{HALF, "bfloat16"}] * 5, {INT}, {INT}),  # neither float32 nor a bias here
    "com.microsoft.MatMulNBits": (FLOATS, {BYTE}, FLOATS),
    "com.microsoft.QuickGelu": (FLOATS,),
    "com.microsoft.RotaryEmbedding": (FLOATS, {WHOLE}, FLOATS, FLOATS),
    "com.microsoft.SkipLayerNormalization": (FLOATS,) * 5,
}
# Inputs that must be of one type: the operators' type parameter T (of MatMulNBits, T1; its codes are not).
SAME = {
    "Add": 2,
    "LayerNormalization": 3,
    "MatMul": 2,
    "Sub": 2,
    "com.microsoft.BiasGelu": 2,
    "com.microsoft.FastGelu": 2,
    "com.microsoft.FusedMatMul": 2,
    "com.microsoft.SkipLayerNormalization": 5,
}


def gpt2(directory: Path) -> TinyModel:
    return tiny_model(directory, torch.float16)


def export_for_cuda(root: Path, make: Callable[[Path], TinyModel], precision: str) -> Bundle:
    if precision == "int8-exact":
        pair = make_pair(root, gpt2_config(), lora=lora_config())
        return export(base=pair.base, adapter=pair.adapter, precision=[precision], target=["cuda"], out=root / "out")[0]
    model = make(root / "merged")
    if precision == "separate":
        options = {"r": 3, "lora_alpha": 6, "target_modules": ["c_attn", "c_proj"]}
        adapter = make_adapter(model.directory, root / "adapter", options, 0)
        return export(base=model.directory, adapter=adapter, adapters="separate", target=["cuda"], out=root / "out")[0]
    return export(model.directory, precision=[precision], target=["cuda"], out=root)[0]


def types_of_every_value(bundle: Bundle) -> tuple[onnx.ModelProto, dict[str, str]]:
    """onnxruntime's own inference: it states the type of an output before it places or changes any node."""
    model = onnx.load(bundle.graph, load_external_data=False)
    known = {value.name for value in model.graph.output}
    names = [name for node in model.graph.node for name in node.output if name and name not in known]
    asked = onnx.ModelProto()
    asked.CopyFrom(model)
    asked.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = ort.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL, 4
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(bundle.directory.resolve())
    )
    session = ort.InferenceSession(asked.SerializeToString(), options, providers=["CPUExecutionProvider"])
    stated = [*session.get_inputs(), *session.get_outputs(), *session.get_overridable_initializers()]
    types = {value.name: value.type.removeprefix("tensor(").removesuffix(")") for value in stated}
    for tensor in model.graph.initializer:
        types[tensor.name] = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
    return model, types


CASES = [(gpt2, precision) for precision in PRECISIONS]
CASES += [(tiny_neox, precision) for precision in ("native", "fp16", "int8", "int4")]


@pytest.mark.parametrize(("make", "precision"), CASES, ids=[f"{one.__name__} {kind}" for one, kind in CASES])
def test_every_node_has_a_kernel_of_the_provider_for_its_types(
    tmp_path: Path, make: Callable[[Path], TinyModel], precision: str
) -> None:
    bundle = export_for_cuda(tmp_path, make, precision)
    model, types = types_of_every_value(bundle)
    seen = set()
    for node in model.graph.node:
        kind = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        assert kind in CUDA_KERNELS, f"{node.name}: the provider has no {kind}"
        given = [types[name] if name else None for name in node.input]
        for i, (allowed, found) in enumerate(zip(CUDA_KERNELS[kind], given, strict=False)):
            assert found is None or found in allowed, f"{node.name}: input {i} of {kind} is {found}"
        assert len(given) <= len(CUDA_KERNELS[kind]), f"{node.name}: the documentation was read for fewer inputs"
        if kind in SAME:
            assert len(set(given[: SAME[kind]])) == 1, f"{node.name}: {given}"
        seen.add(kind)
    assert "com.microsoft.GroupQueryAttention" in seen
    cache = [value.name for value in model.graph.input if value.name.startswith("past_key_values")]
    assert {types[name] for name in cache} == {HALF}
    assert types["logits"] == SINGLE
    onnx.checker.check_model(bundle.graph, full_check=True)


def test_a_node_that_the_provider_does_not_know_would_be_seen(tmp_path: Path) -> None:
    """The float32 attention and the bias of the cpu target are what CUDA has no kernel for."""
    model = tiny_model(tmp_path)
    loaded, types = types_of_every_value(export(model.directory)[0])
    attention = next(node for node in loaded.graph.node if node.op_type == "GroupQueryAttention")
    assert types[attention.input[0]] not in CUDA_KERNELS["com.microsoft.GroupQueryAttention"][0]
    assert len(attention.input) > len(CUDA_KERNELS["com.microsoft.GroupQueryAttention"])


GPU = pytest.mark.skipif(not cuda_is_usable(), reason="no CUDA device is usable here")


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("make", [gpt2, tiny_neox])
def test_on_a_gpu_logits_are_those_of_transformers_in_float16(
    tmp_path: Path, make: Callable[[Path], TinyModel]
) -> None:
    """Tolerance: 2 % of the logits' spread, a few roundings to 11 bits in each of a few dozen sums."""
    model: Any = make(tmp_path / "merged")
    bundle = export(tmp_path / "merged", precision=["fp16"], target=["cuda"], out=tmp_path)[0]
    ids, runner = tokens(24), load(bundle, provider="cuda")
    half = model.model.half().to("cuda")
    with torch.no_grad():
        expected = half(torch.tensor([ids], device="cuda")).logits[0].float().cpu().numpy()
    for chunk in (24, 5):
        np.testing.assert_allclose(runner.logits(ids, chunk=chunk), expected, atol=0.02 * expected.std(), rtol=0)
    cache = runner.new_cache(1)
    runner.prefill(cache, 0, ids[:-1])
    last = runner.decode(cache, ids[-1:])[0]
    np.testing.assert_allclose(last, expected[-1], atol=0.02 * expected.std(), rtol=0)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("precision", ["native", "int8", "int4"])
def test_on_a_gpu_greedy_tokens_are_those_of_the_cpu(tmp_path: Path, precision: str) -> None:
    """Up to the first choice that float16 cannot make: where the two best logits are nearer than its error."""
    model = tiny_model(tmp_path / "merged", torch.float16)
    bundles = export(model.directory, precision=[precision], target=["cpu", "cuda"], out=tmp_path)
    prompts = [tokens(3, seed=1), tokens(9, seed=2)]
    on_cpu, on_gpu = (load(one, provider=one.target).generate(prompts, 12, stop_tokens=()) for one in bundles)
    compared, runner = 0, load(bundles[0], provider="cpu")
    for prompt, ours, theirs in zip(prompts, on_cpu, on_gpu, strict=True):
        logits = np.sort(runner.logits([*prompt, *ours])[len(prompt) - 1 : -1], axis=1)
        margins = logits[:, -1] - logits[:, -2]
        clear = int(np.argmin(margins > 0.05 * logits.std())) if margins.min() <= 0.05 * logits.std() else len(ours)
        assert ours[:clear] == theirs[:clear]
        compared += clear
    assert compared >= 8


@pytest.mark.gpu
@GPU
def test_on_a_gpu_the_cache_stays_on_the_device(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "merged", torch.float16)
    runner = load(export(model.directory, target=["cuda"])[0], provider="cuda")
    cache = runner.new_cache(1)
    runner.prefill(cache, 0, tokens(5))
    assert {buffer.device.type for buffer in cache._buffers} == {"cuda"}
