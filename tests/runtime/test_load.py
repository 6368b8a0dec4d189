"""Loading: the right bundle, unchanged, on the provider asked for, and only if it fits into memory."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from exporter.errors import EnvironmentLacking, InputRefused, UsageError
from exporter.files import sha256_file
from exporter.graph.bundle import bundles_in
from exporter.graph.export import export
from exporter.manifest import write_stage
from exporter.runtime.generate import generate
from exporter.runtime.load import load
from exporter.runtime.memory import needed_memory
from exporter.runtime.session import cuda_is_usable
from tests.graph.conftest import tiny_model, tokens


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    tiny_model(root / "merged", torch.float16)
    export(root / "merged", precision=["native", "int8", "int4"])
    (root / "parity").mkdir()
    return root


@pytest.fixture
def artifacts(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "run")


def test_of_several_bundles_the_nearest_to_the_checkpoint_that_fits(
    artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cuda_is_usable():
        pytest.skip("prefers a cuda bundle here")
    assert load(artifacts).bundle.precision == "native"
    needed = {name: needed_memory(bundles_in(artifacts / name)[0]) for name in ("merged", "int8", "int4")}
    assert needed["merged"] > needed["int8"] > needed["int4"]
    monkeypatch.setattr("exporter.runtime.load.free_memory", lambda provider: needed["int8"])
    assert load(artifacts).bundle.precision == "int8"


def test_too_little_memory_is_said_before_opening_and_names_a_bundle_that_fits(
    artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits = needed_memory(bundles_in(artifacts / "int4")[0])
    monkeypatch.setattr("exporter.runtime.load.free_memory", lambda provider: fits)
    with pytest.raises(EnvironmentLacking, match=r"use .*int4, which fits"):
        load(artifacts / "merged")
    monkeypatch.setattr("exporter.runtime.load.free_memory", lambda provider: 1000)
    with pytest.raises(EnvironmentLacking, match="free memory"):
        load(artifacts / "merged")


def test_what_cannot_be_used_beside_a_bundle_is_passed_over(
    artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret.json").write_text("{}")
    for name in ("int4", "other"):
        (artifacts / name).mkdir(exist_ok=True)
        (artifacts / name / "linked.json").symlink_to(tmp_path / "secret.json")
    fits = needed_memory(bundles_in(artifacts / "int8")[0])
    assert load(artifacts).bundle.precision == "native"
    monkeypatch.setattr("exporter.runtime.load.free_memory", lambda provider: fits)
    with pytest.raises(EnvironmentLacking, match=r"use .*int8, which fits"):
        load(artifacts / "merged")
    (artifacts / "merged/model.safetensors").unlink()
    assert load(artifacts).bundle.precision == "int8"
    shutil.rmtree(artifacts / "int8")
    with pytest.raises(InputRefused, match=r"linked\.json is a link"):
        load(artifacts)


@pytest.mark.parametrize("name", ["merged/model.safetensors", "int4/weights.safetensors", "int4/model.onnx"])
def test_a_changed_file_is_refused(artifacts: Path, name: str) -> None:
    path = artifacts / name
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputRefused, match=f"{path.name} is not the file that was exported"):
        load(path.parent)


def test_a_copy_is_the_same_bundle(artifacts: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(artifacts / "int8", tmp_path / "elsewhere")
    assert (
        load(copy, threads=1).logits(tokens(5)).tolist()
        == load(artifacts / "int8", threads=1).logits(tokens(5)).tolist()
    )


def test_a_checkpoint_too_large_to_read_at_once_is_exported_from_its_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = tiny_model(tmp_path / "model")
    monkeypatch.setattr("exporter.graph.native.READ_AT_ONCE", 0)
    read: list[Path] = []
    monkeypatch.setattr("exporter.manifest.sha256_file", lambda path: read.append(path) or sha256_file(path))
    monkeypatch.setattr("exporter.graph.finite.read_bytes", lambda path, *_: read.append(path))
    bundle = export(tmp_path / "model")[0]
    weights = tmp_path / "model/model.safetensors"
    assert weights not in read
    assert bundle.section["files"][weights.name]["sha256"] is None
    assert np.abs(load(bundle, threads=1).logits(tokens(5)) - tiny.logits(tokens(5))).max() <= 1e-4

    copy = shutil.copytree(tmp_path / "model", tmp_path / "copy")
    with pytest.raises(InputRefused, match=r"is not the file that was exported[\s\S]*export again"):
        load(copy)  # nothing says that it is the same
    export(copy)
    assert load(copy, threads=1).logits(tokens(5)).shape == (5, tiny.model.config.vocab_size)
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(InputRefused, match="is not the file that was exported"):
        load(bundle)


def test_a_directory_without_a_graph_says_what_to_run(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    for directory in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputRefused, match="exporter export"):
            load(directory)


def test_a_target_that_was_not_exported_is_refused(artifacts: Path) -> None:
    with pytest.raises(InputRefused, match="--target cuda"):
        load(artifacts / "int4", target="cuda")


def test_a_provider_that_is_missing_is_named(artifacts: Path) -> None:
    if cuda_is_usable():
        pytest.skip("a CUDA device is here")
    with pytest.raises(EnvironmentLacking, match="CUDAExecutionProvider"):
        load(artifacts / "merged", provider="cuda")
    export(artifacts / "merged", precision=["int8"], target=["cuda"])
    for directory in (artifacts, artifacts / "int8-cuda"):
        with pytest.raises(EnvironmentLacking, match="CUDAExecutionProvider"):
            load(directory, target="cuda")


def test_a_graph_from_a_hostile_manifest_is_not_opened(artifacts: Path) -> None:
    manifest = artifacts / "int4" / "exporter.json"
    manifest.write_text(manifest.read_text().replace('"graph": "model.onnx"', '"graph": "../int8/model.onnx"'))
    with pytest.raises(InputRefused, match=r"\.\./int8"):
        load(artifacts / "int4")


def test_the_manifest_of_a_run_is_not_taken_for_a_bundles(artifacts: Path) -> None:
    """`exporter run` writes a section for each export into its own directory, without a graph in it."""
    for stage in ("sources", "merge", "export-native-cpu", "export-int8-cpu", "verify"):
        write_stage(artifacts, stage, {"request": {}, "files": {}})
    assert load(artifacts).bundle.directory.parent == artifacts


@pytest.mark.parametrize("text", ["caf\udce9", "\udcff"])
def test_a_prompt_that_is_no_utf8_is_refused(artifacts: Path, text: str) -> None:
    with pytest.raises(UsageError, match="UTF-8"):
        generate(artifacts / "merged", prompt=text)
