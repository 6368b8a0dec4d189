"""Downloads from a loopback hub: what is taken, what is not, and what each failure says."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from peft import PeftConfig
from transformers import GPT2Config, GPT2LMHeadModel

from exporter.errors import EnvironmentLacking, InputRefused, UsageError
from exporter.progress import Task
from exporter.sources.adapter import open_adapter
from exporter.sources.checkpoint import open_checkpoint
from exporter.sources.hub import Source, resolve
from exporter.sources.values import read_tensor
from tests.hub_server import Hub

BASE, ADAPTER = "cerebras/tiny-gpt", "someone/tiny-alpaca"
CONFIG = b'{"model_type": "gpt2"}'
WEIGHTS = bytes(range(250)) * 2000
HUB_2 = int(version("huggingface_hub").split(".")[0]) >= 2


def old_layout(directory: Path) -> dict[str, torch.Tensor]:
    """A GPT-2 in the old Cerebras layout, two `.bin` shards and an index, beside files nobody needs. Its weights."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=100, n_positions=16, activation_function="gelu")
    state = {
        name: value.half() for name, value in GPT2LMHeadModel(config).state_dict().items() if name != "lm_head.weight"
    }
    directory.mkdir()
    names = list(state)
    shards = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in (0, 1)}
    for file, members in shards.items():
        torch.save({name: state[name] for name in members}, directory / file)
    weight_map = {name: file for file, members in shards.items() for name in members}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(config.to_json_string())
    for name in ("vocab.json", "merges.txt", "README.md", "LICENSE"):
        (directory / name).write_text("{}")
    for name in (
        "modeling_evil.py",
        "tf_model.h5",
        "flax_model.msgpack",
        "rust_model.ot",
        "model.onnx",
        "tokenizer.py",
    ):
        (directory / name).write_text("not wanted")
    (directory / "checkpoint-10").mkdir()
    (directory / "checkpoint-10" / "pytorch_model.bin").write_text("not wanted")
    return state


def old_adapter(directory: Path) -> None:
    directory.mkdir()
    factors = {"lora_A": torch.randn(4, 32), "lora_B": torch.randn(96, 4)}
    prefix = "base_model.model.transformer.h.{}.attn.c_attn.{}.weight"
    torch.save(
        {prefix.format(i, name): value for i in (0, 1) for name, value in factors.items()},
        directory / "adapter_model.bin",
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    (directory / "pytorch_model.bin").write_text("a training state that nobody needs")


def names(source: Source) -> set[str]:
    return {path.relative_to(source.directory).as_posix() for path in source.directory.rglob("*")}


class Recorder:
    """A Progress that keeps what it was told."""

    def __init__(self) -> None:
        self.total, self.unit, self.done, self.notes = 0.0, "", 0.0, []

    def task(self, title: str, total: float, unit: str = "") -> "Recorder":
        self.total, self.unit = total, unit
        return self

    def note(self, message: str) -> None:
        self.notes.append(message)

    def advance(self, amount: float = 1) -> None:
        self.done += amount

    def __enter__(self) -> Task:
        return self

    def __exit__(self, *exc: object) -> bool | None:
        return None


def test_a_directory_is_used_as_it_is(tmp_path: Path) -> None:
    assert resolve(tmp_path, kind="base") == Source(tmp_path)
    assert resolve(str(tmp_path), kind="adapter") == Source(tmp_path)


def test_a_directory_named_like_a_hub_id_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name", kind="base") == Source(Path("owner/name"))


def test_the_old_layout_arrives_complete_and_without_anything_else(hub: Hub, tmp_path: Path) -> None:
    state = old_layout(tmp_path / "base")
    commit = hub.publish(BASE, tmp_path / "base")
    progress = Recorder()
    source = resolve(BASE, kind="base", progress=progress)
    assert (source.id, source.revision, source.commit) == (BASE, "main", commit)
    shards = {f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)}
    assert names(source) == shards | {
        "pytorch_model.bin.index.json", "config.json", "vocab.json", "merges.txt", "README.md", "LICENSE",
    }  # fmt: skip
    size = sum((source.directory / name).stat().st_size for name in names(source))
    assert (progress.total, progress.unit, progress.done) == (size, "B", size)
    tensors = open_checkpoint(source.directory).tensors
    assert set(tensors) == set(state)
    assert all(torch.equal(read_tensor(tensors[name]), state[name]) for name in state)


def test_an_old_adapter_arrives(hub: Hub, tmp_path: Path) -> None:
    old_adapter(tmp_path / "adapter")
    hub.publish(ADAPTER, tmp_path / "adapter")
    source = resolve(ADAPTER, kind="adapter")
    assert names(source) == {"adapter_config.json", "adapter_model.bin"}
    assert len(open_adapter(source.directory).tensors) == 4
    assert PeftConfig.from_pretrained(str(source.directory)).peft_type == "LORA"


def test_safetensors_are_preferred(hub: Hub) -> None:
    files = {
        "config.json": CONFIG,
        "model.safetensors": b"s",
        "model.fp16.safetensors": b"s",
        "pytorch_model.bin": b"b",
    }
    hub.publish(BASE, files | {"consolidated.safetensors": b"s"})
    assert names(resolve(BASE, kind="base")) == {"config.json", "model.safetensors"}
    adapter = {"adapter_config.json": b"{}", "adapter_model.bin": b"b", "adapter_model.safetensors": b"s"}
    hub.publish(ADAPTER, adapter | files)
    assert names(resolve(ADAPTER, kind="adapter")) == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_second_time_downloads_nothing(hub: Hub) -> None:
    hub.publish(BASE, {"config.json": CONFIG, "model.safetensors": WEIGHTS})
    first = resolve(BASE, kind="base")
    before = len(hub.downloads())
    assert before == 2
    assert resolve(BASE, kind="base") == first
    assert len(hub.downloads()) == before


def test_main_moves_and_a_commit_does_not(hub: Hub) -> None:
    files = {"config.json": CONFIG, "README.md": b"a card"}
    first = hub.publish(BASE, files | {"model.safetensors": b"first"})
    assert resolve(BASE, kind="base").commit == first
    second = hub.publish(BASE, files | {"model.safetensors": b"second"})
    assert resolve(BASE, kind="base").commit == second
    requests = len(hub.requests)
    for source in (resolve(f"{BASE}@{first}", kind="base"), resolve(BASE, revision=first, kind="base")):
        assert (source.directory / "model.safetensors").read_bytes() == b"first"
        assert source.commit == source.revision == first
    assert len(hub.requests) == requests, "a cached commit needs no hub"


def test_what_a_model_library_left_in_the_cache_is_completed(hub: Hub) -> None:
    """from_pretrained fetches no tokenizer, template or licence, and a merge needs them."""
    files = {"config.json": CONFIG, "model.safetensors": b"x", "tokenizer.json": b"{}", "README.md": b"a card"}
    commit = hub.publish(BASE, files)
    for name in ("config.json", "model.safetensors"):
        hf_hub_download(BASE, name, revision=commit)
    found = resolve(f"{BASE}@{commit}", kind="base").directory
    assert {path.name for path in found.iterdir()} == files.keys()


def test_what_says_that_a_snapshot_is_whole_comes_last(hub: Hub) -> None:
    """An interruption on the way leaves nothing that the next run takes for whole."""
    files = {"config.json": CONFIG, "model.safetensors": b"x", "tokenizer.json": b"{}", "README.md": b"a card"}
    commit = hub.publish(BASE, files | {"LICENSE": b"free"})
    resolve(f"{BASE}@{commit}", kind="base")
    asked = hub.downloads()
    assert set(asked[:2]) == {"config.json", "tokenizer.json"}
    assert asked[2] == "model.safetensors"
    assert set(asked[3:]) == {"README.md", "LICENSE"}


def test_a_revision_may_have_slashes(hub: Hub) -> None:
    commit = hub.publish(BASE, {"config.json": CONFIG, "model.safetensors": b"x"}, revision="refs/pr/1")
    assert resolve(f"{BASE}@refs/pr/1", kind="base").commit == commit


def test_a_branch_is_pinned_to_its_commit(hub: Hub) -> None:
    hub.publish(BASE, {"config.json": CONFIG, "model.safetensors": b"main"})
    commit = hub.publish(BASE, {"config.json": CONFIG, "model.safetensors": b"branch"}, revision="v2")
    source = resolve(f"{BASE}@v2", kind="base")
    assert (source.revision, source.commit) == ("v2", commit)
    assert (source.directory / "model.safetensors").read_bytes() == b"branch"


def test_a_known_commit_counts_and_the_revision_is_still_what_was_asked_for(hub: Hub) -> None:
    files = {"config.json": CONFIG, "README.md": b"a card"}
    first = hub.publish(BASE, files | {"model.safetensors": b"first"}, revision="v2")
    hub.publish(BASE, files | {"model.safetensors": b"second"}, revision="v2")
    source = resolve(f"{BASE}@v2", commit=first, kind="base")
    assert (source.revision, source.commit) == ("v2", first)
    assert (source.directory / "model.safetensors").read_bytes() == b"first"
    with pytest.raises(UsageError, match="v2 and the revision main disagree"):
        resolve(f"{BASE}@v2", revision="main", commit=first, kind="base")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small chunks, and no waiting between huggingface_hub's own attempts."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 14)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.mark.usefixtures("impatient")
def test_an_interrupted_file_resumes_where_it_stopped(hub: Hub) -> None:
    """huggingface_hub 2 resumes within the one call, before 2 in the next call."""
    hub.publish(BASE, {"config.json": CONFIG, "model.safetensors": WEIGHTS})
    hub.cut_after = 50_000
    if not HUB_2:
        with pytest.raises(EnvironmentLacking, match="the download resumes"):
            resolve(BASE, kind="base")
        hub.cut_after, hub.requests = None, []
    source = resolve(BASE, kind="base")
    assert (source.directory / "model.safetensors").read_bytes() == WEIGHTS
    starts = [int(request.range.removeprefix("bytes=").rstrip("-")) for request in hub.requests if request.range]
    assert HUB_2 or len(starts) == 1
    assert max(starts) >= 49_152


@pytest.mark.usefixtures("impatient")
def test_complete_files_of_an_interrupted_download_are_kept(hub: Hub) -> None:
    shards = {"model-00001-of-00002.safetensors": b"small", "model-00002-of-00002.safetensors": WEIGHTS}
    hub.publish(BASE, shards | {"config.json": CONFIG, "model.safetensors.index.json": b'{"weight_map": {}}'})
    hub.cut_after = 1_000
    with pytest.raises(EnvironmentLacking):
        resolve(BASE, kind="base")
    hub.cut_after, hub.requests = None, []
    source = resolve(BASE, kind="base")
    assert (source.directory / "model-00002-of-00002.safetensors").read_bytes() == WEIGHTS
    assert set(hub.downloads()) == {"model-00002-of-00002.safetensors"}


def test_offline_takes_what_is_cached_and_says_what_to_do_otherwise(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.publish(BASE, {"config.json": CONFIG, "model.safetensors": WEIGHTS})
    online = resolve(BASE, kind="base")
    requests = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve(BASE, kind="base") == online
    with pytest.raises(EnvironmentLacking, match="unset HF_HUB_OFFLINE") as caught:
        resolve("some/other", kind="base")
    assert caught.value.exit_code == 5
    assert len(hub.requests) == requests


@pytest.mark.usefixtures("impatient")
def test_offline_an_incomplete_snapshot_does_not_count(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.publish(BASE, {"config.json": CONFIG, "model.safetensors": WEIGHTS})
    hub.cut_after = 1_000
    with pytest.raises(EnvironmentLacking):
        resolve(BASE, kind="base")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentLacking, match="is not in the hub cache"):
        resolve(BASE, kind="base")


def test_an_unreachable_hub(hub: Hub) -> None:
    hub.publish(BASE, {"config.json": CONFIG, "model.safetensors": WEIGHTS})
    online = resolve(BASE, kind="base")
    hub.close()
    progress = Recorder()
    assert resolve(BASE, kind="base", progress=progress) == online
    assert "taken from the cache" in progress.notes[0]
    with pytest.raises(EnvironmentLacking, match="could not be downloaded"):
        resolve(ADAPTER, kind="adapter")


def test_an_unknown_repository_and_an_unknown_revision(hub: Hub) -> None:
    hub.publish(BASE, {"config.json": CONFIG, "model.safetensors": WEIGHTS})
    with pytest.raises(InputRefused, match="is not on the hub"):
        resolve("no/such", kind="base")
    with pytest.raises(InputRefused, match="has no revision v9"):
        resolve(f"{BASE}@v9", kind="base")
    with pytest.raises(InputRefused, match="has no revision"):
        resolve(BASE, revision="0" * 40, kind="base")


def test_a_gated_repository_tells_how_to_log_in(hub: Hub) -> None:
    hub.publish(BASE, {"config.json": CONFIG, "model.safetensors": WEIGHTS})
    hub.repositories[BASE].gated = True
    with pytest.raises(InputRefused, match="hf auth login"):
        resolve(BASE, kind="base")


@pytest.mark.parametrize(
    ("kind", "files", "message"),
    [
        ("base", {"config.json": CONFIG, "tf_model.h5": b"x", "onnx/model.safetensors": b"x"}, "no weights"),
        ("base", {"adapter_config.json": b"{}", "adapter_model.bin": b"x"}, "looks like an adapter"),
        ("adapter", {"config.json": CONFIG, "model.safetensors": b"x"}, "looks like a base"),
        ("adapter", {"README.md": b"x"}, "holds no adapter_config.json"),
    ],
)
def test_a_repository_without_what_is_needed(hub: Hub, kind, files, message: str) -> None:
    hub.publish(BASE, files)
    with pytest.raises(InputRefused, match=message):
        resolve(BASE, kind=kind)
    assert not hub.downloads()


@pytest.mark.parametrize("source", ["./x", "../x/y", "/no/such/place", "~/no/such/place", "a/b/c", "name/", "a\\b"])
def test_a_path_that_does_not_exist_is_no_hub_id(hub: Hub, source: str) -> None:
    with pytest.raises(InputRefused, match="no such directory"):
        resolve(source, kind="base")
    with pytest.raises(InputRefused, match="no such directory"):
        resolve(Path(source), kind="base")
    assert not hub.requests


@pytest.mark.parametrize(
    "source",
    [
        "gpt2",
        "",
        "owner/na me",
        "owner/name@",
        "owner/name@a@b",
        "-x/y",
        "owner/..",
        "a/b?c",
        "a--b/c",
        "a/" + "b" * 300,
        "a\0/b",
    ],
)
def test_what_is_neither_directory_nor_id(
    hub: Hub, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputRefused, match="neither a directory nor a hub id"):
        resolve(source, kind="base")
    assert not hub.requests


def test_a_file_and_revisions_that_make_no_sense(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputRefused, match="is a file"):
        resolve(tmp_path / "file", kind="base")
    with pytest.raises(UsageError, match="no revision"):
        resolve(tmp_path, revision="main", kind="base")
    with pytest.raises(UsageError, match="disagree"):
        resolve("a/b@main", revision="v2", kind="base")


def test_a_full_disk_is_seen_before_the_first_byte(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.publish(BASE, {"config.json": CONFIG, "model.safetensors": WEIGHTS})
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, len(WEIGHTS)))  # the config is too much
    with pytest.raises(EnvironmentLacking, match="set HF_HOME"):
        resolve(BASE, kind="base")
    assert not hub.downloads()
    monkeypatch.undo()


def test_huggingface_hubs_own_bars_stay_as_they_were(hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    hub.publish(BASE, {"config.json": CONFIG, "model.safetensors": WEIGHTS})
    disabled = are_progress_bars_disabled()
    resolve(BASE, kind="base")
    assert are_progress_bars_disabled() == disabled
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_a_child_process_sees_the_hub_and_respects_offline(hub: Hub) -> None:
    hub.publish(BASE, {"config.json": CONFIG, "model.safetensors": WEIGHTS})
    program = f"""
from exporter.sources.hub import resolve
from exporter.errors import ExporterError
try:
    print(resolve({BASE!r}, kind="base").commit)
except ExporterError as error:
    raise SystemExit(error.exit_code)
"""
    root = str(Path(__file__).parents[2])

    def run(**env: str) -> subprocess.CompletedProcess[str]:
        environment = hub.env | {"PYTHONPATH": root} | env
        return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)

    assert run(HF_HUB_OFFLINE="1").returncode == 5
    online = run()
    assert online.returncode == 0, online.stderr
    offline = run(HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert offline.stdout == online.stdout
    assert os.path.commonpath([constants.HF_HUB_CACHE, str(hub.home)]) == str(hub.home)
