"""`exporter run` over several precisions and targets; what its stages do themselves is tested with them."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig

import exporter
from exporter.errors import EnvironmentLacking, InputRefused, UsageError
from exporter.graph.bundle import bundles_in
from exporter.manifest import read_manifest
from exporter.pipeline import PARITY_FILES, RunResult
from exporter.runtime.memory import needed_memory
from tests.hub_server import Hub, hub  # noqa: F401 (a fixture)
from tests.notes import Notes
from tests.pairs import Pair, edit_json, lora_config, make_pair, rewrite


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[Path]]:
    """The bundles that each run asks to be verified; the verdict is the stand-in's."""
    found: list[list[Path]] = []

    def verify(*, bundle: list[Path], report: Path, **others: Any) -> SimpleNamespace:
        found.append(bundle)
        report.mkdir(exist_ok=True)
        for name in PARITY_FILES:
            (report / name).write_text("")
        return SimpleNamespace(verdict="PASS", exit_code=0)

    monkeypatch.setattr("exporter.verification.verify", verify)
    return found


def run(pair: Pair, out: Path, **options: Any) -> RunResult:
    return exporter.run(base=pair.base, adapter=pair.adapter, out=out, **options)


def test_both_targets_in_native_precision_are_one_directory(
    pair: Pair, tmp_path: Path, asked: list[list[Path]]
) -> None:
    out = tmp_path / "out"
    done = run(pair, out, target=("cuda", "cpu"))
    assert [stage.name for stage in done.stages] == ["merge", "export-native-cpu", "export-native-cuda", "verify"]
    assert {"model.onnx", "model_cuda.onnx"} <= {path.name for path in (out / "merged").iterdir()}
    assert asked == [[out / "merged"]]
    assert run(pair, out, target=("cuda", "cpu")).did_nothing


def test_another_precision_has_a_directory_for_each_target(pair: Pair, tmp_path: Path, asked: list[list[Path]]) -> None:
    out = tmp_path / "out"
    run(pair, out, precision=("native", "int8"), target=("cpu", "cuda"))
    assert asked == [[out / "merged", out / "int8", out / "int8-cuda"]]
    assert (out / "int8/model.onnx").is_file()
    assert (out / "int8-cuda/model_cuda.onnx").is_file()


def test_a_graph_that_was_deleted_is_made_again_and_verified_again(
    pair: Pair, tmp_path: Path, asked: list[list[Path]]
) -> None:
    out = tmp_path / "out"
    run(pair, out, target=("cpu", "cuda"))
    (out / "merged/model_cuda.onnx").unlink()
    redone = [stage.name for stage in run(pair, out, target=("cpu", "cuda")).stages if not stage.skipped]
    assert "export-native-cuda" in redone
    assert "merge" not in redone
    assert (out / "merged/model_cuda.onnx").is_file()


def test_a_file_that_somebody_changed_is_named_before_it_is_made_again(
    pair: Pair, tmp_path: Path, asked: list[list[Path]]
) -> None:
    out, notes = tmp_path / "out", Notes()
    run(pair, out)
    before = (out / "merged/README.md").read_bytes()
    (out / "merged/README.md").write_bytes(before + b"mine")
    run(pair, out, progress=notes)
    assert "merge: merged/README.md changed since the run that wrote it, and is made again" in notes.said
    assert (out / "merged/README.md").read_bytes() == before


@pytest.mark.parametrize("what", ["versions", "code_digest"])
def test_another_verifier_verifies_again(
    what: str, pair: Pair, tmp_path: Path, asked: list[list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(pair, tmp_path / "out")
    monkeypatch.setattr(f"exporter.pipeline.{what}", lambda: "another")
    assert [stage.name for stage in run(pair, tmp_path / "out").stages if not stage.skipped] == ["verify"]
    assert len(asked) == 2


def test_somebodys_model_in_its_directory_is_kept(pair: Pair, tmp_path: Path, asked: list[list[Path]]) -> None:
    """A native export leaves a manifest there, which says of no merge."""
    out = tmp_path / "out"
    shutil.copytree(pair.base, out / "merged")
    exporter.export(out / "merged")
    before = contents(out / "merged")
    with pytest.raises(UsageError, match="holds something else"):
        run(pair, out)
    (out / "merged/.model_cuda.onnx.partial").touch()  # as an export leaves it that was killed
    with pytest.raises(UsageError, match="holds another merge or a damaged one"):
        run(pair, out)
    (out / "merged/.model_cuda.onnx.partial").unlink()
    assert contents(out / "merged") == before


def test_another_merge_in_its_directory_is_kept_and_this_very_one_is_taken(
    pair: Pair, tmp_path: Path, asked: list[list[Path]]
) -> None:
    out = tmp_path / "out"
    exporter.merge(base=pair.base, adapter=pair.adapter, out=out / "merged", weight=[2])
    before = contents(out / "merged")
    with pytest.raises(UsageError, match="holds another merge"):
        run(pair, out)
    assert contents(out / "merged") == before
    exporter.merge(base=pair.base, adapter=pair.adapter, out=out / "merged", force=True)
    inode = (out / "merged/model.safetensors").stat().st_ino
    run(pair, out)
    assert (out / "merged/model.safetensors").stat().st_ino == inode
    run(pair, out, template="alpaca")  # its own by now
    assert (out / "merged/model.safetensors").stat().st_ino != inode


@pytest.mark.parametrize("revision", ["", "@v1"])
def test_a_hub_id_stays_at_the_commit_of_the_first_run(
    pair: Pair,
    tmp_path: Path,
    asked: list[list[Path]],
    hub: Hub,  # noqa: F811
    revision: str,
) -> None:
    branch, out = revision[1:] or "main", tmp_path / "out"
    commit = hub.publish("o/base", pair.base, branch)
    hub.publish("o/adapter", pair.adapter)

    def run_ids() -> RunResult:
        return exporter.run(base=f"o/base{revision}", adapter="o/adapter", out=out)

    run_ids()
    hub.publish("o/base", {"config.json": b"{}", "model.safetensors": b"another"}, branch)
    assert run_ids().did_nothing
    (out / "merged/model.safetensors").unlink()
    assert not run_ids().did_nothing
    origin = (read_manifest(out / "merged") or {})["stages"]["merge"]["request"]["base"]
    assert (origin["revision"], origin["commit"]) == (branch, commit)


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_a_bundle_of_an_earlier_adapter_does_not_pass_for_the_new_ones(
    pair: Pair, tmp_path: Path, asked: list[list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, notes = tmp_path / "out", Notes()
    run(pair, out, precision=("native", "int8"))
    rewrite(pair.adapter / "adapter_model.safetensors", lambda tensors: {n: 2 * t for n, t in tensors.items()})
    run(pair, out, progress=notes)
    assert [note for note in notes.said if note.startswith(f"{out / 'int8'}: export-int8-cpu of an earlier run")]
    assert "export-int8-cpu" not in (read_manifest(out) or {})["stages"]

    assert exporter.load(out).bundle.precision == "native"
    needed = needed_memory(bundles_in(out / "int8")[0])
    monkeypatch.setattr("exporter.runtime.load.free_memory", lambda provider: needed)
    with pytest.raises(InputRefused, match=r"int8 was made of other weights than .*merged"):
        exporter.load(out)
    with pytest.raises(EnvironmentLacking, match="to do: free memory"):
        exporter.load(out / "merged")
    assert exporter.load(out / "int8").bundle.precision == "int8"
    run(pair, out, precision=("native", "int8"))
    assert exporter.load(out).bundle.precision == "int8"


def test_what_no_export_would_take_is_refused_before_the_merge(pair: Pair, tmp_path: Path) -> None:
    edit_json(pair.base / "config.json", activation_function="gelu_10")
    with pytest.raises(InputRefused, match="gelu_10"):
        run(pair, tmp_path / "out")
    llama = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    lora = lora_config(target_modules=["q_proj"], fan_in_fan_out=False)
    with pytest.raises(InputRefused, match=r"'llama'[\s\S]*merge .*export .*--builder optimum.* verify"):
        run(make_pair(tmp_path / "llama", llama, lora=lora), tmp_path / "out")
    assert not (tmp_path / "out").exists()
