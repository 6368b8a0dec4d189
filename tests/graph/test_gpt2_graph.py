"""The graph says what transformers says, with any padding, any split into calls, any option it accepts."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exporter.graph.export import export
from tests.graph.calls import Graph, one_row, padded
from tests.graph.conftest import TinyModel, tiny_model, tokens

TOLERANCE = 1e-4  # the worst seen is 1e-6
LENGTH = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(tmp_path_factory.mktemp("float32"))


@pytest.fixture(scope="module")
def graph(model: TinyModel) -> Graph:
    return Graph(export(model.directory)[0].graph)


def test_prefill_equals_transformers_up_to_the_last_position(model: TinyModel, graph: Graph) -> None:
    ids = tokens(32)
    np.testing.assert_allclose(graph(*one_row(ids))[0][0], model.logits(ids), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("past", [1, 15, 31])
def test_one_token_after_a_cache_equals_transformers(model: TinyModel, graph: Graph, past: int) -> None:
    ids = tokens(past + 1)
    cache = graph(*one_row(ids[:past]))[1]
    logits = graph(*one_row(ids[past:], past), cache)[0]
    np.testing.assert_allclose(logits[0, 0], model.logits(ids)[-1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_chunks_equal_one_call(model: TinyModel, graph: Graph, chunk: int) -> None:
    ids, cache, parts = tokens(LENGTH), graph.empty(1), []
    for start in range(0, LENGTH, chunk):
        logits, cache = graph(*one_row(ids[start : start + chunk], start), cache)
        parts.append(logits[0])
    np.testing.assert_allclose(np.concatenate(parts), model.logits(ids), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("pad", [0, 33, 256])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_single_rows_through_prefill_and_decoding(
    model: TinyModel, graph: Graph, side: str, pad: int
) -> None:
    rows = [tokens(n, seed=n) for n in (9, 1, 5)]
    ids, mask, positions = padded(rows, side, pad)
    logits, cache = graph(ids, mask, positions)
    for i, row in enumerate(rows):
        np.testing.assert_allclose(logits[i, mask[i] == 1], model.logits(row), atol=TOLERANCE, rtol=0)
    for step in range(4):
        new = np.array([[step], [7], [40 + step]])
        mask = np.concatenate([mask, np.ones((3, 1), np.int64)], axis=1)
        logits, cache = graph(new, mask, mask.sum(1, keepdims=True) - 1, cache)
        for i, row in enumerate(rows):
            row.append(int(new[i, 0]))
            np.testing.assert_allclose(logits[i, 0], model.logits(row)[-1], atol=TOLERANCE, rtol=0)


def test_the_pad_token_changes_nothing_at_all(graph: Graph) -> None:
    rows = [tokens(9), tokens(4)]
    for side in ("left", "right"):
        one, other = (graph(*padded(rows, side, pad))[0] for pad in (0, 200))
        mask = padded(rows, side, 0)[1] == 1
        assert np.array_equal(one[mask], other[mask])


def test_logits_of_the_last_positions_are_an_option(model: TinyModel, graph: Graph) -> None:
    assert "logits_to_keep" not in {value.name for value in graph.session.get_inputs()}
    ids, mask, positions = one_row(tokens(LENGTH))
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "logits_to_keep": np.array([3])}
    logits = np.asarray(graph.session.run(["logits"], feeds | graph.empty(1))[0])
    assert logits.shape == (1, 3, 257)
    np.testing.assert_allclose(logits[0], model.logits(ids[0].tolist())[-3:], atol=TOLERANCE, rtol=0)


OPTIONS = {
    "gelu_new": {"activation_function": "gelu_new"},
    "gelu_pytorch_tanh": {"activation_function": "gelu_pytorch_tanh"},
    "gelu_fast": {"activation_function": "gelu_fast"},
    "quick_gelu": {"activation_function": "quick_gelu"},
    "relu": {"activation_function": "relu"},
    "silu": {"activation_function": "silu"},
    "n_inner": {"n_inner": 96},
    "unscaled": {"scale_attn_weights": False},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3},
    "upcast": {"reorder_and_upcast_attn": True},
    "epsilon": {"layer_norm_epsilon": 0.1},
    "untied": {"tie_word_embeddings": False},
    "resized vocabulary": {"vocab_size": 263},
    "head of 24": {"n_embd": 96, "n_head": 4},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_honoured_option_equals_transformers(tmp_path: Path, name: str) -> None:
    model = tiny_model(tmp_path, **OPTIONS[name])
    ids = tokens(LENGTH)
    logits = Graph(export(tmp_path)[0].graph)(*one_row(ids))[0][0]
    np.testing.assert_allclose(logits, model.logits(ids), atol=5e-5, rtol=0)
    plain = tiny_model(tmp_path / "plain").logits(ids)
    if logits.shape == plain.shape and name != "upcast":
        assert np.abs(logits - plain).max() > 2e-4, "the option changed nothing: no evidence"


def test_checkpoints_without_prefix_and_with_mask_buffers_are_the_same_model(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    model = tiny_model(tmp_path)
    tensors = {
        name.removeprefix("transformer."): tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 32, 32).tril().bool()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    ids = tokens(LENGTH)
    logits = Graph(export(tmp_path)[0].graph)(*one_row(ids))[0][0]
    np.testing.assert_allclose(logits, model.logits(ids), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_stored_types_enter_through_a_cast(tmp_path: Path, dtype: str) -> None:
    import torch

    model = tiny_model(tmp_path, getattr(torch, dtype))
    ids = tokens(LENGTH)
    logits = Graph(export(tmp_path)[0].graph)(*one_row(ids))[0][0]
    np.testing.assert_allclose(logits, model.logits(ids), atol=TOLERANCE, rtol=0)


def test_the_checker_accepts_the_graph_and_it_holds_no_transpose(model: TinyModel, graph: Graph) -> None:
    path = model.directory / "model.onnx"
    onnx.checker.check_model(path, full_check=True)
    loaded = onnx.load(path, load_external_data=False)
    assert "Transpose" not in {node.op_type for node in loaded.graph.node}
    assert loaded.opset_import[0].version == 21
    assert loaded.producer_name == "exporter"
    assert {entry.key for entry in loaded.metadata_props} >= {"exporter.version", "exporter.target"}


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    heads=st.integers(1, 4),
    head_size=st.sampled_from([8, 16, 40]),
    layers=st.integers(1, 3),
    inner=st.one_of(st.none(), st.integers(1, 80)),
    vocabulary=st.integers(2, 300),
    activation=st.sampled_from(["gelu", "gelu_new", "relu"]),
    tied=st.booleans(),
    seed=st.integers(0, 1 << 16),
)
def test_random_architectures_equal_transformers(
    tmp_path_factory: pytest.TempPathFactory,
    heads: int,
    head_size: int,
    layers: int,
    inner: int | None,
    vocabulary: int,
    activation: str,
    tied: bool,
    seed: int,
) -> None:
    directory = tmp_path_factory.mktemp("any")
    model = tiny_model(
        directory,
        seed=seed,
        n_embd=heads * head_size,
        n_head=heads,
        n_layer=layers,
        n_inner=inner,
        vocab_size=vocabulary,
        activation_function=activation,
        tie_word_embeddings=tied,
        n_positions=9,
    )
    ids = tokens(9, seed, vocabulary)
    graph = Graph(export(directory)[0].graph)
    expected = model.logits(ids)
    tolerance = TOLERANCE * max(1.0, float(np.abs(expected).max()) / 10)
    logits, cache = graph(*one_row(ids[:4]))
    np.testing.assert_allclose(logits[0], expected[:4], atol=tolerance, rtol=0)
    for at in range(4, 9):
        logits, cache = graph(*one_row(ids[at : at + 1], at), cache)
        np.testing.assert_allclose(logits[0, 0], expected[at], atol=tolerance, rtol=0)
