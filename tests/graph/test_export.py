"""What export leaves on the disk: a graph over the checkpoint's own bytes, and a manifest that says so."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.errors import EnvironmentLacking, InputRefused, UsageError
from exporter.graph.bundle import bundles_in
from exporter.graph.dequantize import dequantized_weights
from exporter.graph.export import export
from exporter.graph.weights import WEIGHTS
from exporter.manifest import describe_file, read_manifest, write_stage
from tests.graph.conftest import TinyModel, save_byte_tokenizer, tiny_model


def size_of(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir())


def test_native_adds_a_graph_and_no_weight(tmp_path: Path) -> None:
    tiny_model(tmp_path, torch.float16)
    weights = (tmp_path / "model.safetensors").read_bytes()
    before = size_of(tmp_path)
    bundles = export(tmp_path, target=["cpu", "cuda"])
    assert [bundle.graph.name for bundle in bundles] == ["model.onnx", "model_cuda.onnx"]
    assert size_of(tmp_path) - before < 80_000
    assert (tmp_path / "model.safetensors").read_bytes() == weights
    assert not [file.name for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_every_initializer_is_the_checkpoints_tensor_byte_for_byte(tmp_path: Path) -> None:
    tiny_model(tmp_path, torch.float16)
    graph = onnx.load(export(tmp_path)[0].graph, load_external_data=False).graph
    tensors = load_file(tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    external = {entry.name: {e.key: e.value for e in entry.external_data} for entry in graph.initializer}
    external = {name: place for name, place in external.items() if place}
    assert external.keys() == tensors.keys()
    for name, place in external.items():
        start, length = int(place["offset"]), int(place["length"])
        assert place["location"] == "model.safetensors"
        assert data[start : start + length] == tensors[name].numpy().tobytes()


def test_shards_are_pointed_into_one_by_one(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    model.model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    bundle = export(tmp_path / "sharded")[0]
    section = bundle.section
    assert len(section["weights"]) > 2
    onnx.checker.check_model(bundle.graph, full_check=True)
    for name, value in dequantized_weights(bundle):
        assert torch.equal(value, model.model.state_dict()[name])


def test_the_manifest_hashes_graph_and_weights(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    export(tmp_path)
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    section = manifest["stages"]["export-native-cpu"]
    assert section["provenance"] == "unknown"
    for name in ("model.onnx", "model.safetensors", "genai_config.json"):
        assert section["files"][name]["sha256"] == describe_file(tmp_path / name)["sha256"]


def test_a_hash_that_merge_recorded_is_taken_over_while_the_file_is_the_same(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    weights = tmp_path / "model.safetensors"
    write_stage(tmp_path, "merge", {"files": {weights.name: describe_file(weights, "recorded by merge")}})
    export(tmp_path)
    section = bundles_in(tmp_path)[0].section
    assert section["provenance"] == "merge"
    assert section["files"][weights.name]["sha256"] == "recorded by merge"
    weights.write_bytes(weights.read_bytes())  # another mtime: the record no longer counts
    export(tmp_path)
    assert bundles_in(tmp_path)[0].section["files"][weights.name]["sha256"] == describe_file(weights)["sha256"]


def test_exporting_again_gives_the_same_bytes(tmp_path: Path) -> None:
    tiny_model(tmp_path / "merged")

    def written() -> list[bytes]:
        bundles = export(tmp_path / "merged", precision=["native", "int4"])
        return [bundle.graph.read_bytes() for bundle in bundles] + [(tmp_path / "int4" / WEIGHTS).read_bytes()]

    assert written() == written()


def test_genai_config_pads_with_the_end_token(tmp_path: Path) -> None:
    tiny_model(tmp_path, pad_token_id=0)
    export(tmp_path)
    content = json.loads((tmp_path / "genai_config.json").read_bytes())["model"]
    assert (content["type"], content["pad_token_id"], content["eos_token_id"]) == ("decoder", 256, 256)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_another_precision_stands_alone_beside_the_checkpoint(tmp_path: Path, precision: str) -> None:
    source = tmp_path / "merged"
    tiny_model(source)
    save_byte_tokenizer(source)
    (source / "chat_template.jinja").write_text("{{ messages[0]['content'] }}\r\n")
    bundle = export(source, precision=[precision])[0]
    assert bundle.directory == tmp_path / precision
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (bundle.directory / name).read_bytes() == (source / name).read_bytes()
    assert {"genai_config.json", "exporter.json", "weights.safetensors"} <= {f.name for f in bundle.directory.iterdir()}
    assert "model.onnx" not in {file.name for file in source.iterdir()}
    onnx.checker.check_model(bundle.graph, full_check=True)
    assert bundles_in(tmp_path / precision) == [bundle]


def test_bin_weights_are_streamed_into_a_directory_of_their_own(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "old", torch.float16)
    torch.save(load_file(tmp_path / "old" / "model.safetensors"), tmp_path / "old" / "pytorch_model.bin")
    (tmp_path / "old" / "model.safetensors").unlink()
    with pytest.raises(InputRefused, match=r"pytorch_model\.bin.*cannot be pointed into"):
        export(tmp_path / "old")
    bundle = export(tmp_path / "old", out=tmp_path / "out")[0]
    assert bundle.directory == tmp_path / "out" / "native"
    for name, value in dequantized_weights(bundle):
        assert torch.equal(value, model.model.state_dict()[name])


def edit_config(directory: Path, **changes: object) -> None:
    config = json.loads((directory / "config.json").read_bytes())
    (directory / "config.json").write_text(json.dumps(config | changes))


REFUSED = {
    "add_cross_attention": ({"add_cross_attention": True}, "add_cross_attention"),
    "activation": ({"activation_function": "gelu_10"}, "gelu_10"),
    "quantized": ({"quantization_config": {"bits": 8}}, "quantization_config"),
    "head size": ({"n_head": 16}, "n_head 16"),
    "architecture": ({"model_type": "llama"}, "llama"),
    "layers": ({"n_layer": 3}, r"h\.2\..*missing"),
    "fewer layers": ({"n_layer": 1}, "does not have"),
    "width": ({"n_embd": 32}, "shape"),
    "vocabulary": ({"vocab_size": 258}, "shape"),
    "not a number": ({"n_layer": "2"}, "n_layer"),
    "untied without head": ({"tie_word_embeddings": False}, "lm_head"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    changes, message = REFUSED[name]
    tiny_model(tmp_path)
    edit_config(tmp_path, **changes)
    before = sorted(file.name for file in tmp_path.iterdir())
    with pytest.raises(InputRefused, match=message):
        export(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == before


def test_upcast_attention_is_refused_in_float16(tmp_path: Path) -> None:
    tiny_model(tmp_path, reorder_and_upcast_attn=True)
    with pytest.raises(InputRefused, match="reorder_and_upcast_attn"):
        export(tmp_path, target=["cuda"])


def test_float16_overflow_names_the_tensor_and_leaves_nothing(tmp_path: Path) -> None:
    tiny_model(tmp_path / "merged")
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    tensors["transformer.h.1.mlp.c_fc.weight"][3, 5] = 70000.0
    save_file(tensors, tmp_path / "merged" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputRefused, match=r"h\.1\.mlp\.c_fc\.weight.*overflows"):
        export(tmp_path / "merged", precision=["fp16"])
    assert not (tmp_path / "fp16").exists()


def test_foreign_files_are_not_overwritten_without_force(tmp_path: Path) -> None:
    tiny_model(tmp_path / "merged")
    (tmp_path / "merged" / "model.onnx").write_text("mine")
    (tmp_path / "int8").mkdir()
    (tmp_path / "int8" / "thesis.txt").write_text("mine")
    for precision in ("native", "int8"):
        with pytest.raises(UsageError, match="--force"):
            export(tmp_path / "merged", precision=[precision])
    assert (tmp_path / "merged" / "model.onnx").read_text() == "mine"
    export(tmp_path / "merged", precision=["native", "int8"], force=True)


def test_a_foreign_genai_config_is_not_overwritten_without_force(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    path = tmp_path / "genai_config.json"
    path.write_text("mine")
    with pytest.raises(UsageError, match=r"genai_config\.json is there[\s\S]*--force"):
        export(tmp_path)
    assert path.read_text() == "mine"
    assert not (tmp_path / "model.onnx").exists()
    (bundle,) = export(tmp_path, force=True)
    written = path.read_bytes()
    for name in ("exporter.json", "model.onnx"):  # what is written is no loss, with a graph of ours or without one
        (tmp_path / name).unlink()
        assert export(tmp_path) == [bundle]
    (tmp_path / "exporter.json").unlink()
    path.write_text("of an export that was killed, with other options")
    assert export(tmp_path) == [bundle]
    assert path.read_bytes() == written


def test_an_out_that_would_stay_empty_is_refused(tmp_path: Path) -> None:
    source, out = tmp_path / "model", tmp_path / "elsewhere"
    tiny_model(source)
    before = sorted(source.iterdir())
    with pytest.raises(UsageError, match=r"beside the weights that it reads[\s\S]*fp16"):
        export(source, out=out)
    assert sorted(source.iterdir()) == before
    for place in (source, tmp_path):
        assert export(source, out=place)[0].directory == source
    assert [bundle.directory for bundle in export(source, precision=["native", "fp16"], out=out)] == [
        source,
        out / "fp16",
    ]


@pytest.mark.parametrize("force", [False, True])
def test_the_checkpoints_own_directory_is_no_output(tmp_path: Path, force: bool) -> None:
    """A precision's directory has a plain name, and so may the user's model: force is no leave to lose it."""
    source = tmp_path / "fp16"
    tiny_model(source)
    save_byte_tokenizer(source)
    export(source)
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    with pytest.raises(UsageError, match="checkpoint's own directory"):
        export(source, precision=["fp16"], force=force)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="checkpoint's own directory"):
        export(source, precision=["fp16"], out=tmp_path / "link", force=force)
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before


def test_a_native_export_does_not_make_somebodys_model_an_output(tmp_path: Path) -> None:
    tiny_model(tmp_path / "merged")
    mine = tmp_path / "int8"
    tiny_model(mine, seed=1)
    export(mine)
    before = {file.name: file.read_bytes() for file in mine.iterdir()}
    with pytest.raises(UsageError, match="holds something else"):
        export(tmp_path / "merged", precision=["int8"])
    assert {file.name: file.read_bytes() for file in mine.iterdir()} == before


def test_names_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="int3"):
        export(tmp_path, precision=["int3"])
    with pytest.raises(UsageError, match="tpu"):
        export(tmp_path, target=["tpu"])


def test_a_full_disk_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model(tmp_path / "merged")

    def full(path: object) -> object:
        return type("Usage", (), {"free": 1000})

    monkeypatch.setattr("exporter.files.shutil.disk_usage", full)
    with pytest.raises(EnvironmentLacking, match="int4"):
        export(tmp_path / "merged", precision=["int4"])
    assert not (tmp_path / "int4").exists()


def test_large_tensors_of_a_bundle_are_aligned(tmp_path: Path, tiny: TinyModel) -> None:
    bundle = export(tiny.directory, precision=["int4"], out=tmp_path)[0]
    initializers = onnx.load(bundle.graph, load_external_data=False).graph.initializer
    places = [{e.key: int(e.value) for e in one.external_data if e.key != "location"} for one in initializers]
    whole = [place for place in places if place and place["length"] % 4096 == 0]
    assert len(whole) > 4
    assert not np.any([place["offset"] % 4096 for place in whole])


def test_an_export_that_was_killed_before_its_manifest_can_be_run_again(tmp_path: Path) -> None:
    tiny_model(tmp_path / "merged")
    for precision in ("native", "int8"):
        bundle = export(tmp_path / "merged", precision=[precision])[0]
        (bundle.directory / "exporter.json").unlink()
        assert export(tmp_path / "merged", precision=[precision]) == [bundle]


@pytest.mark.parametrize("targets", [["cpu", "cuda"], ["cuda", "cpu"]])
def test_two_targets_share_genai_config_and_every_listed_hash_holds(tmp_path: Path, targets: list[str]) -> None:
    tiny_model(tmp_path)
    for target in targets:
        export(tmp_path, target=[target])
    content = json.loads((tmp_path / "genai_config.json").read_bytes())
    assert content["model"]["decoder"]["filename"] == "model.onnx"
    assert len(bundles_in(tmp_path)) == 2
    for bundle in bundles_in(tmp_path):
        for name, entry in bundle.section["files"].items():
            assert describe_file(tmp_path / name)["sha256"] == entry["sha256"]


def test_weights_of_another_bundle_beside_a_checkpoint_are_not_the_graphs(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "merged")
    (native,) = export(tmp_path / "merged")
    (other,) = export(tmp_path / "merged", precision=["fp16"])
    (native.directory / WEIGHTS).write_bytes((other.directory / WEIGHTS).read_bytes())
    for name, value in dequantized_weights(native):
        assert torch.equal(value, model.model.state_dict()[name])


def test_linked_weights_are_not_pointed_into(tmp_path: Path) -> None:
    """A hub cache holds links, and ONNX's external data may not be one."""
    snapshot = tmp_path / "cache/snapshots/c0ffee"
    model = tiny_model(snapshot)
    (tmp_path / "cache/blobs").mkdir()
    (snapshot / "model.safetensors").rename(tmp_path / "cache/blobs/blob")
    (snapshot / "model.safetensors").symlink_to("../../blobs/blob")
    with pytest.raises(InputRefused, match="--out"):
        export(snapshot)
    bundle = export(snapshot, out=tmp_path)[0]
    onnx.checker.check_model(bundle.graph, full_check=True)
    for name, value in dequantized_weights(bundle):
        assert torch.equal(value, model.model.state_dict()[name])


def test_what_an_earlier_export_copied_and_this_one_does_not_is_removed(tmp_path: Path) -> None:
    """A template that is gone from the checkpoint would otherwise go on to be used."""
    tiny_model(tmp_path / "merged")
    save_byte_tokenizer(tmp_path / "merged")
    (tmp_path / "merged/chat_template.jinja").write_text("{{ messages[0].content }}")
    (bundle,) = export(tmp_path / "merged", precision=["int8"])
    assert (bundle.directory / "chat_template.jinja").is_file()
    (tmp_path / "merged/chat_template.jinja").unlink()
    export(tmp_path / "merged", precision=["int8"])
    assert not (bundle.directory / "chat_template.jinja").exists()
    assert (tmp_path / "merged/tokenizer.json").is_file()
