"""A graph run range by range says what the whole graph says, caches included."""

from pathlib import Path

import numpy as np
import pytest

from exporter.parity import feeding
from exporter.parity.bundles import load_graph
from exporter.parity.graph_ranges import RangedGraph, RangedScorer, graph_nbytes
from exporter.parity.graphs import Call, GraphSession, wrong_activation
from tests.parity.conftest import Made
from tests.parity.test_blocks import documents

ROW = list(range(3, 50))


@pytest.mark.parametrize("kind", ["merged", "int8", "int4"])
def test_every_call_gives_the_whole_graphs_logits(made: Made, tmp_path: Path, kind: str) -> None:
    directory = getattr(made, kind)
    model = load_graph(directory / "model.onnx")
    whole, ranged = GraphSession(model, directory, "cpu"), RangedGraph(model, directory, "cpu", tmp_path)
    assert len(ranged.ranges) >= 3
    calls = [
        Call(np.array([ROW])),
        *feeding.decode_calls(ROW[:30], 20, 1),
        *feeding.decode_calls(ROW[:30], 20, 12, is_stale=True),
        Call(np.array([ROW]), positions=np.arange(1, 48)[None]),
        feeding.padded_call([ROW, ROW[:9]], "left", 7),
    ]
    wanted, found = list(whole.run(calls)), list(ranged.run(calls))
    assert max(np.abs(a - b).max() for a, b in zip(wanted, found, strict=True)) <= 1e-6
    assert np.abs(wanted[0][0, 29] - wanted[11][0, 0]).max() < 1e-3  # decoded as prefilled
    assert np.abs(wanted[11] - wanted[22]).max() > 1e-2  # a stale slot is another answer
    assert not list(tmp_path.iterdir())


def test_no_range_holds_all_weights(made: Made, tmp_path: Path) -> None:
    model = load_graph(made.merged / "model.onnx")
    ranged = RangedGraph(model, made.merged, "cpu", tmp_path)
    row = ROW[:5]
    sizes = []
    for nodes in ranged.ranges:
        given = {name: np.zeros((1, 5, 64), np.float32) for name in ranged._graph.carried(nodes)}
        part = ranged._graph.extract(nodes, given)
        sizes.append(graph_nbytes(part))
        assert part.graph.node
    head = 480 * 64 * 4  # the embeddings are in the first range and in the last
    assert sum(sizes) < graph_nbytes(model) + 2 * head
    assert max(sizes) < 0.7 * graph_nbytes(model)
    assert len(ranged.logits(row)) == 5


def test_documents_go_through_together_and_in_order(made: Made, tmp_path: Path) -> None:
    model = load_graph(made.merged / "model.onnx")
    whole = GraphSession(model, made.merged, "cpu")
    scorer = RangedScorer(RangedGraph(model, made.merged, "cpu", tmp_path), documents())
    for one in documents()[1:]:  # the first was scored before an interruption
        assert np.abs(scorer.logits(one.tokens) - whole.logits(one.tokens)).max() <= 1e-6


def test_a_wrong_graph_is_as_wrong_range_by_range(made: Made, tmp_path: Path) -> None:
    model = load_graph(made.merged / "model.onnx")
    wrong = wrong_activation(model)
    assert wrong is not None
    found = RangedGraph(wrong, made.merged, "cpu", tmp_path).logits(ROW)
    right = GraphSession(model, made.merged, "cpu").logits(ROW)
    assert np.abs(found - GraphSession(wrong, made.merged, "cpu").logits(ROW)).max() <= 1e-6
    assert np.abs(found - right).max() > 1e-4
