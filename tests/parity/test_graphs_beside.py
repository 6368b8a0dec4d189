"""A directory with a graph for each target over one set of weights: each graph that can run here has its verdict."""

import shutil
from pathlib import Path

import pytest

from exporter.graph.export import export
from exporter.parity import bundles
from exporter.parity.bundles import open_bundles
from exporter.parity.verify import verify
from exporter.runtime.session import cuda_is_usable
from tests.parity.conftest import Made, open_bundle


@pytest.fixture
def both(made: Made, tmp_path: Path) -> Path:
    directory = Path(shutil.copytree(made.merged, tmp_path / "merged"))
    export(directory, target=("cuda",))
    return directory


def test_without_a_cuda_provider_the_graph_for_cuda_is_named_as_not_run(both: Path) -> None:
    (only,) = open_bundles(both)
    assert (only.target, only.others) == ("cpu", ("model_cuda.onnx",))


def test_with_one_each_graph_is_a_bundle(both: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "cuda_is_usable", lambda: True)
    first, second = open_bundles(both)
    assert [(one.graph.name, one.target, one.others) for one in (first, second)] == [
        ("model.onnx", "cpu", ()),
        ("model_cuda.onnx", "cuda", ()),
    ]
    assert first.provenance == second.provenance == "known"
    assert first.weights == second.weights
    assert first.content != second.content


def test_a_graph_that_the_manifest_does_not_list_is_unknown_beside_one_that_is_known(
    made: Made, both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundles, "cuda_is_usable", lambda: True)
    copy = Path(shutil.copytree(made.merged, tmp_path / "copy"))
    shutil.copy(both / "model_cuda.onnx", copy)
    assert [one.provenance for one in open_bundles(copy)] == ["known", "unknown"]


def test_a_graph_for_cuda_alone_is_opened_wherever_it_is(both: Path) -> None:
    (both / "model.onnx").unlink()
    assert "model.onnx" in (both / "exporter.json").read_text()
    (both / "exporter.json").unlink()
    assert open_bundle(both).target == "cuda"


@pytest.mark.gpu
@pytest.mark.skipif(not cuda_is_usable(), reason="no CUDA device is usable here")
def test_both_verdicts_stand_in_the_result(made: Made, both: Path) -> None:
    found = verify(base=made.base, adapter=made.adapter, bundle=both, prompts=made.prompts)
    assert [(one.target, one.correctness) for one in found.bundles] == [("cpu", "PASS"), ("cuda", "PASS")]
