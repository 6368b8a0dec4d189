"""GPT-NeoX through its own builder: one file and one line of the registry, held to what GPT-2 is held to."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from exporter.errors import InputRefused
from exporter.graph.dequantize import dequantized_weights
from exporter.graph.export import export
from exporter.runtime.load import load
from tests.graph.calls import Graph, one_row, padded
from tests.graph.conftest import TinyModel, tokens

TOLERANCE = 1e-4
VOCABULARY, POSITIONS, LENGTH = 257, 32, 20


def tiny_neox(directory: Path, dtype: torch.dtype = torch.float32, **options: Any) -> TinyModel:
    """Every parameter is random and far from its initial value."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": POSITIONS,
        "bos_token_id": 256,
        "eos_token_id": 256,
    }
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**(settings | options))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.1 * noise if "norm" in name and name.endswith("weight") else 0.2 * noise)
    torch.nn.Module.to(model, dtype)
    model.save_pretrained(directory)
    return TinyModel(directory, model.float())


@pytest.fixture(scope="module", params=[True, False], ids=["parallel residual", "sequential residual"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_neox(tmp_path_factory.mktemp("neox") / "merged", use_parallel_residual=request.param)


@pytest.fixture(scope="module")
def graph(model: TinyModel) -> Graph:
    return Graph(export(model.directory)[0].graph)


def test_prefill_equals_transformers_up_to_the_last_position(model: TinyModel, graph: Graph) -> None:
    ids = tokens(POSITIONS)
    np.testing.assert_allclose(graph(*one_row(ids))[0][0], model.logits(ids), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("past", [1, 15, 31])
def test_one_token_after_a_cache_equals_transformers(model: TinyModel, graph: Graph, past: int) -> None:
    ids = tokens(past + 1)
    cache = graph(*one_row(ids[:past]))[1]
    logits = graph(*one_row(ids[past:], past), cache)[0]
    np.testing.assert_allclose(logits[0, 0], model.logits(ids)[-1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_single_rows_through_prefill_and_decoding(
    model: TinyModel, graph: Graph, side: str
) -> None:
    rows = [tokens(n, seed=n) for n in (9, 1, 5)]
    ids, mask, positions = padded(rows, side, 33)
    logits, cache = graph(ids, mask, positions)
    for i, row in enumerate(rows):
        np.testing.assert_allclose(logits[i, mask[i] == 1], model.logits(row), atol=TOLERANCE, rtol=0)
    for step in range(3):
        new = np.array([[step], [7], [40 + step]])
        mask = np.concatenate([mask, np.ones((3, 1), np.int64)], axis=1)
        logits, cache = graph(new, mask, mask.sum(1, keepdims=True) - 1, cache)
        for i, row in enumerate(rows):
            row.append(int(new[i, 0]))
            np.testing.assert_allclose(logits[i, 0], model.logits(row)[-1], atol=TOLERANCE, rtol=0)


OPTIONS = {
    "all of a head rotated": {"rotary_pct": 1.0},
    "half of a head rotated": {"rotary_pct": 0.5},
    "another base": {"rotary_emb_base": 100},
    "positions divided": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "no attention bias": {"attention_bias": False},
    "tanh": {"hidden_act": "gelu_new"},
    "relu": {"hidden_act": "relu"},
    "epsilon": {"layer_norm_eps": 0.1},
    "tied": {"tie_word_embeddings": True},
    "three heads of 24": {"hidden_size": 72, "num_attention_heads": 3, "rotary_pct": 0.25},
    "one layer": {"num_hidden_layers": 1},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_honoured_option_equals_transformers(tmp_path: Path, name: str) -> None:
    model = tiny_neox(tmp_path, **OPTIONS[name])
    ids = tokens(LENGTH)
    logits = Graph(export(tmp_path)[0].graph)(*one_row(ids))[0][0]
    np.testing.assert_allclose(logits, model.logits(ids), atol=TOLERANCE, rtol=0)
    assert np.abs(logits - tiny_neox(tmp_path / "plain").logits(ids)).max() > 1e-3, "the option changed nothing"


def change_config(directory: Path, **values: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


REFUSED = {
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "rope_parameters": None},
    "rotary_pct": {"rotary_pct": 0.01, "rope_parameters": None},
    "hidden_act": {"hidden_act": "gelu_10"},
    "is_causal": {"is_causal": False},
    "attention_bias": {"attention_bias": "yes"},
    "num_attention_heads": {"num_attention_heads": 5},
    "quantization_config": {"quantization_config": {"bits": 4}},
    "head_dim": {"head_dim": 8},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(tmp_path: Path, name: str) -> None:
    tiny_neox(tmp_path)
    change_config(tmp_path, **REFUSED[name])
    with pytest.raises(InputRefused, match=name):
        export(tmp_path)
    assert not (tmp_path / "model.onnx").exists()


def test_the_spelling_of_transformers_5_is_the_same_model(tmp_path: Path) -> None:
    model = tiny_neox(tmp_path, rotary_pct=0.5, rotary_emb_base=100)
    config = json.loads((tmp_path / "config.json").read_text())
    kept = {key: value for key, value in config.items() if "rotary" not in key and not key.startswith("rope")}
    rope = {"rope_type": "default", "rope_theta": 100, "partial_rotary_factor": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(kept | {"rope_parameters": rope}))
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {"embed_out.weight": "lm_head.weight", "lm_head.weight": "embed_out.weight"}  # the other version's name
    save_file({renamed.get(name, name): one for name, one in tensors.items()}, tmp_path / "model.safetensors")
    ids = tokens(LENGTH)
    logits = Graph(export(tmp_path)[0].graph)(*one_row(ids))[0][0]
    np.testing.assert_allclose(logits, model.logits(ids), atol=TOLERANCE, rtol=0)


def test_the_float_graph_copies_and_transposes_no_weight(model: TinyModel, graph: Graph) -> None:
    path = model.directory / "model.onnx"
    onnx.checker.check_model(path, full_check=True)
    loaded = onnx.load(path, load_external_data=False)
    assert "Transpose" not in {node.op_type for node in loaded.graph.node}
    outside = [one for one in loaded.graph.initializer if one.data_location == onnx.TensorProto.EXTERNAL]
    assert {one.name for one in outside} == set(load_file(model.directory / "model.safetensors"))
    tables = 2 * POSITIONS * 2 * 4  # cos and sin of 4 rotated elements, float32
    inside = sum(len(one.raw_data) for one in loaded.graph.initializer if one not in outside)
    assert tables <= inside < tables + 200


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_a_bundle_of_its_own_computes_what_its_weights_mean(model: TinyModel, tmp_path: Path, precision: str) -> None:
    """transformers with the bundle's dequantized weights is the oracle: no quantization error is in the comparison."""
    bundle = export(model.directory, precision=[precision], out=tmp_path)[0]
    onnx.checker.check_model(bundle.graph, full_check=True)
    twin = GPTNeoXForCausalLM(GPTNeoXConfig.from_pretrained(model.directory)).eval()
    twin.load_state_dict(dict(dequantized_weights(bundle)), strict=True)
    ids = tokens(LENGTH)
    runner = load(bundle, threads=1)
    # MatMulNBits rounds activations to 8 bits (accuracy_level 4); float differs by the order of sums alone.
    expected = TinyModel(bundle.directory, twin).logits(ids)
    spread = float(expected.std())
    tolerance = TOLERANCE if precision.startswith("fp") else 0.1 * spread
    for chunk in (LENGTH, 7):
        np.testing.assert_allclose(runner.logits(ids, chunk=chunk), expected, atol=tolerance, rtol=0)
    # the weights themselves moved by no more than the precision's step
    error = np.abs(expected - model.logits(ids)).mean() / spread
    assert error < {"fp32": 1e-6, "fp16": 2e-3, "int8": 0.03, "int4": 0.4}[precision]


def test_greedy_generation_of_a_ragged_batch_equals_transformers(model: TinyModel, graph: Graph) -> None:
    prompts = [tokens(3, seed=1), tokens(9, seed=2)]
    answers = load(model.directory, threads=1).generate(prompts, 8, stop_tokens=())
    assert answers == [model.greedy(prompt, 8)[0] for prompt in prompts]


def test_the_cuda_graph_is_float16_but_for_the_head(model: TinyModel, tmp_path: Path) -> None:
    bundle = export(model.directory, precision=["fp16"], target=["cuda"], out=tmp_path)[0]
    loaded = onnx.load(bundle.graph, load_external_data=False)
    cache = [value for value in loaded.graph.input if value.name.startswith("past_key_values")]
    assert {value.type.tensor_type.elem_type for value in cache} == {onnx.TensorProto.FLOAT16}
    onnx.checker.check_model(bundle.graph, full_check=True)
