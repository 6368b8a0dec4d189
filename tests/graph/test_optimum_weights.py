"""Optimum's graph reads the checkpoint's tensors, by their names, from one safetensors file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from exporter.errors import InputRefused
from exporter.graph import optimum_builder, optimum_weights
from exporter.graph.bundle import Bundle, bundle_weights
from exporter.graph.export import export
from exporter.runtime.load import load
from tests.graph.conftest import llama_config, tokens
from tests.notes import Notes

pytest.importorskip("optimum.exporters.onnx", reason="optimum's ONNX part is not installed", exc_type=ImportError)

NORM = "model.norm.weight"


def llama(directory: Path) -> Any:
    """As transformers makes it: all norms are ones, so that several tensors are equal."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(llama_config()).eval()
    model.save_pretrained(directory)
    return model


def after_tracing(monkeypatch: pytest.MonkeyPatch, change: Callable[[onnx.ModelProto, Path], object]) -> None:
    """Let optimum write another graph than it does. change: of the graph, and where it lies."""
    traced = optimum_builder._trace

    def trace(checkpoint: Path, output: Path) -> None:
        traced(checkpoint, output)
        model = onnx.load(output / "model.onnx")
        change(model, output / "model.onnx")

    monkeypatch.setattr(optimum_builder, "_trace", trace)


def save_outside(model: onnx.ModelProto, path: Path) -> None:
    """As optimum saves more than 2 GB."""
    path.unlink()
    onnx.save_model(model, path, save_as_external_data=True, location="model.onnx_data", size_threshold=0)


def check_logits(bundle: Bundle, model: Any) -> None:
    ids = tokens(20)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(load(bundle, threads=1).logits(ids, chunk=7), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("outside", [False, True], ids=["weights in the graph", "weights beside it"])
def test_the_file_holds_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outside: bool) -> None:
    model = llama(tmp_path / "merged")
    if outside:
        after_tracing(monkeypatch, save_outside)
    (bundle,) = export(tmp_path / "merged", builder="optimum")
    stored, given = (
        load_file(bundle.directory / "weights.safetensors"),
        load_file(tmp_path / "merged/model.safetensors"),
    )
    assert stored.keys() == given.keys() == bundle_weights(bundle).keys()
    assert all(torch.equal(stored[name], given[name]) for name in given)
    assert bundle.section["weights"] == ["weights.safetensors"]
    assert bundle.section["missing"] == []
    assert not list(bundle.directory.glob("model.onnx_data*"))
    assert bundle.graph.stat().st_size < 200_000  # the graph holds no weights
    onnx.checker.check_model(str(bundle.graph), full_check=True)
    check_logits(bundle, model)


def test_of_equal_tensors_one_stands_for_all(tmp_path: Path) -> None:
    """A tracer keeps one vector of ones; the file holds all five norms, and the manifest says which is read."""
    llama(tmp_path / "merged")
    (bundle,) = export(tmp_path / "merged", builder="optimum")
    initializers = {one.name for one in onnx.load(bundle.graph, load_external_data=False).graph.initializer}
    norms = {name for name in load_file(tmp_path / "merged" / "model.safetensors") if "norm" in name}
    (read,) = initializers & norms
    assert bundle.section["shared"] == dict.fromkeys(norms - {read}, read)


def test_a_tensor_that_the_graph_does_not_hold_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that a tracer folded into something else, and one that the model does not use at all."""
    model = llama(tmp_path / "merged")
    with torch.no_grad():
        model.get_parameter(NORM).fill_(1.25)  # unlike the other norms
    model.save_pretrained(tmp_path / "merged")
    path = tmp_path / "merged" / "model.safetensors"
    save_file(load_file(path) | {"unused": torch.randn(7)}, path, {"format": "pt"})

    def fold(traced: onnx.ModelProto, path: Path) -> None:
        norm = next(one for one in traced.graph.initializer if one.name == NORM)
        norm.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(norm) * 2, NORM))
        onnx.save(traced, path)

    after_tracing(monkeypatch, fold)
    notes = Notes()
    (bundle,) = export(tmp_path / "merged", builder="optimum", progress=notes)
    assert bundle.section["missing"] == [NORM, "unused"]
    assert not {NORM, "unused"} & load_file(bundle.directory / "weights.safetensors").keys()
    assert f"2 tensors of the checkpoint do not stand in optimum's graph as they are, such as {NORM}" in notes.said[-1]


def test_weights_that_are_no_tensors_of_the_checkpoint_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond what a graph may hold; the limit is lowered here, for a gigabyte is no test's."""
    llama(tmp_path / "merged")

    def fold(traced: onnx.ModelProto, path: Path) -> None:
        for one in traced.graph.initializer:
            one.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(one) * 2, one.name))
        save_outside(traced, path)

    after_tracing(monkeypatch, fold)
    monkeypatch.setattr(optimum_weights, "INSIDE", 1000)
    with pytest.raises(InputRefused, match=r"equal no tensor of the checkpoint, such as .*\(257, 32\)"):
        export(tmp_path / "merged", builder="optimum")
    assert not list((tmp_path / "optimum").glob("*.onnx"))
