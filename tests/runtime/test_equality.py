"""Prefill = chunked prefill = cached decoding = padded batch = transformers in float32, for any small GPT-2."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from exporter.graph.config_values import ACTIVATIONS
from exporter.graph.export import export
from exporter.runtime.load import load
from tests.graph.conftest import TinyModel, tiny_model, tokens
from tests.graph.test_gpt2_graph import Graph, padded

TOLERANCE = 1e-4
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """A configuration, and how its work is split."""

    options: dict[str, Any]
    dtype: torch.dtype
    seed: int
    chunk: int
    lengths: tuple[int, ...]  # of the rows of a batch, each with room for two more tokens
    pad: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    heads, head_size = draw(st.integers(1, 4)), draw(st.sampled_from([8, 16, 24]))
    positions, vocabulary = draw(st.integers(4, 24)), draw(st.integers(2, 300))
    options = {
        "n_embd": heads * head_size,
        "n_head": heads,
        "n_layer": draw(st.integers(1, 3)),
        "n_inner": draw(st.one_of(st.none(), st.integers(1, 80))),
        "n_positions": positions,
        "vocab_size": vocabulary,
        "activation_function": draw(st.sampled_from(sorted(ACTIVATIONS))),
        "tie_word_embeddings": draw(st.booleans()),
        "scale_attn_weights": draw(st.booleans()),
        "scale_attn_by_inverse_layer_idx": draw(st.booleans()),
        "reorder_and_upcast_attn": draw(st.booleans()),
        "layer_norm_epsilon": draw(st.sampled_from([1e-5, 1e-6, 1e-2])),
    }
    return Case(
        options,
        draw(st.sampled_from(DTYPES)),
        draw(st.integers(0, 1 << 16)),
        draw(st.integers(1, positions)),
        tuple(draw(st.lists(st.integers(1, positions - 2), min_size=1, max_size=4))),
        draw(st.integers(0, vocabulary - 1)),
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("equality")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_every_way_of_computing_equals_transformers(root: Path, case: Case) -> None:
    model = tiny_model(root, case.dtype, case.seed, **case.options)
    bundle = export(root)[0]
    positions, vocabulary = case.options["n_positions"], case.options["vocab_size"]
    ids = tokens(positions, case.seed, vocabulary)
    expected = model.logits(ids)
    event(f"logits up to {10 ** int(np.log10(np.abs(expected).max() + 1e-9))}")
    runner = load(bundle, threads=1)
    for chunk in (positions, case.chunk):
        near(runner.logits(ids, chunk=chunk), expected)
    for past in {1, positions // 2, positions - 1}:
        cache = runner.new_cache(1, capacity=past)
        near(runner.prefill(cache, 0, ids[:past], chunk=case.chunk), expected[past - 1])
        near(runner.decode(cache, [ids[past]])[0], expected[past])
    rows = [tokens(n, case.seed + i, vocabulary) for i, n in enumerate(case.lengths)]
    grown = [row + tokens(2, case.seed + 9, vocabulary) for row in rows]
    answers = [model.logits(row) for row in grown]
    cache = runner.new_cache(len(rows))
    for i, row in enumerate(rows):
        near(runner.prefill(cache, i, row), answers[i][len(row) - 1])
    for step in range(2):
        found = runner.decode(cache, [row[step - 2] for row in grown])
        for i, row in enumerate(rows):
            near(found[i], answers[i][len(row) + step])
    graph = Graph(bundle.graph)
    for side in ("left", "right"):
        padded_batch_is_single_rows(graph, case, rows, grown, answers, side)


def padded_batch_is_single_rows(
    graph: Graph, case: Case, rows: list[list[int]], grown: list[list[int]], answers: list[np.ndarray], side: str
) -> None:
    ids, mask, places = padded(rows, side, case.pad)
    logits, cache = graph(ids, mask, places)
    for i, row in enumerate(rows):
        near(logits[i, mask[i] == 1], answers[i][: len(row)])
    for step in range(2):
        mask = np.concatenate([mask, np.ones((len(rows), 1), np.int64)], axis=1)
        new = np.array([[row[step - 2]] for row in grown])
        logits, cache = graph(new, mask, mask.sum(1, keepdims=True) - 1, cache)
        for i, row in enumerate(rows):
            near(logits[i, 0], answers[i][len(row) + step])


def near(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(expected).max() > 1e-2, "logits of nothing: no evidence"
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    model = tiny_model(tmp_path_factory.mktemp("wrong"))
    export(model.directory)
    return model


@pytest.mark.parametrize("wrong", ["position", "mask", "token"])
def test_the_tolerance_sees_a_wrong_position_mask_or_token(model: TinyModel, wrong: str) -> None:
    """The comparison above can fail: each of these mistakes is far outside of it."""
    graph, row = Graph(model.directory / "model.onnx"), tokens(12)
    ids, mask, places = np.array([row]), np.ones((1, 12), np.int64), np.arange(12)[None]
    if wrong == "position":
        places[0, 5] = 6
    elif wrong == "mask":
        mask[0, 0] = 0
    else:
        ids[0, 5] += 1
    with pytest.raises(AssertionError):
        near(graph(ids, mask, places)[0][0], model.logits(row))
