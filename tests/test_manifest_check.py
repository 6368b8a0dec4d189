"""`verify-manifest` reads every byte that is listed: what is missing or changed is named, and what nobody listed."""

import json
import shutil
from pathlib import Path

import pytest

import exporter
from exporter.errors import InputRefused
from exporter.files import sha256_file
from exporter.progress import Silent, TaskContext
from tests.pairs import as_bin, gpt2_config, make_pair, save_base


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """artifacts/<name> with a merged checkpoint of several shards, a native graph, an 8-bit bundle, a separate one."""
    place = tmp_path_factory.mktemp("manifest")
    pair = make_pair(place, gpt2_config(n_embd=32))
    name = place / "name"
    exporter.merge(base=pair.base, adapter=pair.adapter, out=name / "merged", shard_size=30_000)
    exporter.export(name / "merged", precision=["native", "int8"])
    exporter.export(base=pair.base, adapter=pair.adapter, adapters="separate", out=name / "separate")
    return name


@pytest.fixture
def name(made: Path, tmp_path: Path) -> Path:
    """A copy: other inodes and times, which do not count."""
    return Path(shutil.copytree(made, tmp_path / "name"))


@pytest.mark.parametrize("part", ["merged", "int8", "separate"])
def test_an_untouched_directory_is_as_listed(name: Path, part: str) -> None:
    check = exporter.verify_manifest(name / part)
    assert check.exit_code == 0
    assert (check.changed, check.missing, check.unhashed, check.extra) == ((), (), (), ())
    listed = json.loads((name / part / "exporter.json").read_bytes())["stages"].values()
    files = {file for section in listed for file in section["files"]}
    assert check.files == len(files) == len(list((name / part).iterdir())) - 1
    assert check.nbytes == sum((name / part / file).stat().st_size for file in files)
    assert check.tensors == len({tensor for section in listed for tensor in section.get("tensors", {})}) > 20


def test_everything_beneath_a_directory(name: Path) -> None:
    check = exporter.verify_manifest(name)
    parts = [exporter.verify_manifest(name / part) for part in ("merged", "int8", "separate")]
    assert (check.manifests, check.exit_code) == (3, 0)
    assert check.files == sum(part.files for part in parts)
    assert check.tensors == sum(part.tensors for part in parts)


def test_one_changed_bit_names_its_file_and_its_tensor(name: Path) -> None:
    shards = sorted((name / "merged").glob("model-*.safetensors"))
    assert len(shards) > 2
    data = bytearray(shards[1].read_bytes())
    data[-1] ^= 1
    shards[1].write_bytes(data)
    check = exporter.verify_manifest(name / "merged")
    assert check.exit_code == 4
    assert len(check.changed) == 2
    assert check.changed[0] == shards[1].name
    assert check.changed[1].startswith(f"{shards[1].name}: transformer.")


@pytest.mark.parametrize("file", ["merged/config.json", "merged/model.onnx", "int8/tokenizer.json"])
def test_a_changed_small_file(name: Path, file: str) -> None:
    (name / file).write_bytes((name / file).read_bytes() + b" ")
    check = exporter.verify_manifest(name)
    assert (check.exit_code, check.changed) == (4, (file,))


def test_a_missing_file(name: Path) -> None:
    (name / "separate/adapter.onnx_adapter").unlink()
    check = exporter.verify_manifest(name)
    assert (check.exit_code, check.missing, check.changed) == (4, ("separate/adapter.onnx_adapter",), ())


def test_a_truncated_file_of_weights(name: Path) -> None:
    path = name / "int8/weights.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    check = exporter.verify_manifest(name / "int8")
    assert check.exit_code == 4
    assert "weights.safetensors" in check.changed


def test_a_file_that_nobody_listed_is_a_note(name: Path) -> None:
    (name / "int8/mine.txt").write_text("mine")
    check = exporter.verify_manifest(name)
    assert (check.exit_code, check.extra) == (0, ("int8/mine.txt",))


def test_a_wrong_digest_of_a_tensor_is_seen_though_the_file_is_right(name: Path) -> None:
    """The two are looked at apart: a manifest that contradicts itself is not true."""
    path = name / "merged/exporter.json"
    manifest = json.loads(path.read_bytes())
    manifest["stages"]["merge"]["tensors"]["transformer.ln_f.bias"]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    (changed,) = exporter.verify_manifest(name / "merged").changed
    assert changed.endswith(": transformer.ln_f.bias")


def test_a_merge_without_proof_has_no_hashes_to_compare(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, gpt2_config(n_embd=32))
    exporter.merge(base=pair.base, adapter=pair.adapter, out=tmp_path / "out", proof="none")
    check = exporter.verify_manifest(tmp_path / "out")
    assert (check.exit_code, check.unhashed) == (0, ("model.safetensors",))
    path = tmp_path / "out/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert exporter.verify_manifest(tmp_path / "out").changed == ("model.safetensors",)


def test_a_directory_without_a_manifest_is_refused(tmp_path: Path) -> None:
    save_base(tmp_path / "base", gpt2_config(n_embd=32))
    as_bin(tmp_path / "base")
    for place in (tmp_path / "base", tmp_path / "nowhere", tmp_path / "base/config.json"):
        with pytest.raises(InputRefused):
            exporter.verify_manifest(place)


class Counter(Silent):
    """What was announced."""

    total = 0.0

    def task(self, title: str, total: float, unit: str = "") -> TaskContext:
        self.total += total
        return super().task(title, total, unit)


def test_the_progress_is_of_every_byte_that_is_read(name: Path) -> None:
    counter = Counter()
    assert exporter.verify_manifest(name, progress=counter).nbytes == counter.total > 0


def test_the_digests_are_those_of_sha256sum(name: Path) -> None:
    """The oracle: hashlib over the whole file, not the reading in parts."""
    manifest = json.loads((name / "int8/exporter.json").read_bytes())
    entry = manifest["stages"]["export-int8-cpu"]["files"]["weights.safetensors"]
    assert entry["sha256"] == sha256_file(name / "int8/weights.safetensors")
