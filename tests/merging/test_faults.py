"""What goes wrong outside of Exporter: one clear message, its exit code, nothing half-written, and a way to go on."""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import exporter
from exporter.errors import EnvironmentLacking, ExporterError, InputRefused, UsageError
from exporter.files import LOCK, lock_directory
from exporter.manifest import MANIFEST
from exporter.merging import merge as merging
from exporter.merging import publish, shards
from exporter.merging.journal import JOURNAL
from tests.merging.test_merge import assert_equals_peft
from tests.pairs import Pair, edit_json, gpt2_config, make_pair

SHARD = 100_000


def merge(pair: Pair, out: Path, **changes: Any) -> Any:
    call = {"base": pair.base, "adapter": pair.adapter, "out": out, "shard_size": SHARD, "memory": 100_000}
    return exporter.merge(**(call | changes))


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def weights_of(directory: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(directory).items() if name != MANIFEST}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def wanted(made: Pair, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("wanted") / "out"
    merge(made, out)
    assert len(list(out.glob("*.safetensors"))) >= 4
    return weights_of(out)


def only_finished_shards(out: Path) -> bool:
    """True if `out` is not there, or holds nothing but shards under partial names with the journal that lists them."""
    if not out.exists():
        return True
    names = {path.name for path in out.iterdir()}
    return JOURNAL in names and all(n == JOURNAL or n.endswith(".safetensors.partial") for n in names)


class FailingCall:
    """A function of `os` whose n-th call fails with `code`; all later ones too, as on a full disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, code: int, number: int) -> None:
        self.calls, self.failed, self.number, self.code = 0, 0, number, code
        self.original: Callable[..., Any] = getattr(os, name)
        monkeypatch.setattr(os, name, self)

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls >= self.number:
            self.failed += 1
            raise OSError(self.code, os.strerror(self.code))
        return self.original(*arguments)


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("pwrite", errno.ENOSPC, "No space left"),
        ("fsync", errno.ENOSPC, "No space left"),
        ("fsync", errno.EIO, "Input/output error"),
        ("preadv", errno.EIO, "reading .* at byte .* failed"),
    ],
)
@pytest.mark.parametrize("over_old", [False, True], ids=["new", "over another merge"])
def test_a_disk_that_fails_at_any_call(
    made: Pair,
    wanted: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    code: int,
    message: str,
    over_old: bool,
) -> None:
    """The old output stands until the new one is on the disk; then only renaming is left, which the disk may fail too.

    The same command goes on afterwards.
    """
    with monkeypatch.context() as patch:
        counted = FailingCall(patch, name, code, 10**9)
        merge(made, tmp_path / "count")
    step = max(1, counted.calls // 6)
    for number in [*range(1, counted.calls, step), counted.calls]:
        out = tmp_path / str(number)
        if over_old:
            merge(made, out, weight=[0.5])
        before = contents(out) if over_old else {}
        with monkeypatch.context() as patch:
            failing = FailingCall(patch, name, code, number)
            with pytest.raises(EnvironmentLacking, match=message) as raised:
                merge(made, out, force=over_old)
        assert failing.failed
        assert raised.value.exit_code == 5
        after = contents(out) if out.exists() else {}
        seen = {n: data for n, data in after.items() if not n.startswith(".")}
        if name == "fsync" and seen != before:  # only syncs are left where files are removed and renamed
            assert "config.json" not in seen or {n: data for n, data in seen.items() if n != MANIFEST} == wanted
        else:
            assert seen == before
            assert over_old or only_finished_shards(out)
        hidden = {n for n in after if n.startswith(".")}
        assert all(n == JOURNAL or n.endswith(".safetensors.partial") for n in hidden)
        merge(made, out, force=over_old)
        assert weights_of(out) == wanted
        shutil.rmtree(out)


def test_small_files_that_do_not_fit_leave_the_old_output(
    made: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them and the manifest are on the disk before a file of the old output goes."""
    out = tmp_path / "out"
    merge(made, out, weight=[0.5])
    before, names = contents(out), []

    def full(path: Path, data: bytes) -> None:
        names.append(path.name)
        if path.name == MANIFEST:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        path.with_name(f".{path.name}.partial").write_bytes(data)

    monkeypatch.setattr(publish, "write_partial", full)
    with pytest.raises(EnvironmentLacking, match="No space left"):
        merge(made, out, force=True)
    assert "config.json" in names
    assert {n: data for n, data in contents(out).items() if not n.startswith(".")} == before


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], capture_output=True
        ).returncode
    ):
        pytest.skip("only root may mount a small file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full(
    made: Pair, wanted: dict[str, bytes], tiny_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tiny_disk / "out"
    with pytest.raises(EnvironmentLacking, match="are free"):
        merge(made, out)
    assert not out.exists()
    with monkeypatch.context() as patch:
        patch.setattr(merging, "require_free_space", lambda *_: None)
        with pytest.raises(EnvironmentLacking, match="No space left"):
            merge(made, out)
    assert only_finished_shards(out)
    kept = {path.name: path.stat().st_ino for path in out.glob(".model*.partial")} if out.exists() else {}
    assert kept, "the disk held one shard, and it was not kept"
    subprocess.run(["mount", "-o", "remount,size=64m", str(tiny_disk)], check=True)
    merge(made, out)
    assert weights_of(out) == wanted
    for name, inode in kept.items():
        assert (out / name.removeprefix(".").removesuffix(".partial")).stat().st_ino == inode


def test_what_was_left_half_written_counts_as_free(made: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a nearly full disk a merge that was killed must be able to go on."""
    out = tmp_path / "out"
    out.mkdir()
    (out / LOCK).touch()
    (out / ".model.safetensors.partial").write_bytes(bytes(1000))
    usage = shutil.disk_usage(tmp_path)

    def free(_: Path) -> Any:
        return usage._replace(free=0 if (out / ".model.safetensors.partial").exists() else usage.free)

    monkeypatch.setattr(shutil, "disk_usage", free)
    merge(made, out)
    assert_equals_peft(made, out)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def replace(path: Path) -> None:
    copy = path.with_name("copy")
    shutil.copy(path, copy)
    copy.replace(path)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("step", ["write_shard", "prove_shard"])
@pytest.mark.parametrize("change", [append, replace, truncate, Path.unlink])
@pytest.mark.parametrize("which", ["base/model.safetensors", "base/config.json", "adapter/adapter_model.safetensors"])
def test_an_input_that_changes_during_the_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, change: Callable[[Path], None], which: str
) -> None:
    """Refused even where every byte read was the old one: the manifest would describe a file that is gone."""
    pair, out = make_pair(tmp_path), tmp_path / "out"
    original = getattr(shards, step)
    changes = iter([change])

    def changing(*arguments: Any, **keywords: Any) -> Any:
        for one in changes:
            one(tmp_path / which)
        return original(*arguments, **keywords)

    monkeypatch.setattr(shards, step, changing)
    with pytest.raises(InputRefused, match=r"changed while it was read|ends at byte|is gone|malformed"):
        merge(pair, out)
    assert not out.exists()


@pytest.mark.parametrize("where", [3, -3, "truncate", "delete"])
def test_a_shard_that_is_damaged_after_writing(
    made: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: int | str
) -> None:
    """A disk that returns other bytes than it was given: the proof reads every byte again."""
    out, original = tmp_path / "out", shards.prove_shard

    def damaging(path: Path, *arguments: Any) -> Any:
        if where == "delete":
            path.unlink()
        elif where == "truncate":
            truncate(path)
        else:
            data = bytearray(path.read_bytes())
            data[int(where)] ^= 1
            path.write_bytes(data)
        return original(path, *arguments)

    monkeypatch.setattr(shards, "prove_shard", damaging)
    with pytest.raises(ExporterError) as raised:
        merge(made, out)
    assert raised.value.exit_code in (4, 5)
    assert not out.exists()


def test_an_output_directory_that_vanishes(made: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, original = tmp_path / "out", shards.prove_shard

    def removing(*arguments: Any) -> Any:
        shutil.rmtree(out, ignore_errors=True)
        return original(*arguments)

    monkeypatch.setattr(shards, "prove_shard", removing)
    with pytest.raises(EnvironmentLacking, match="No such file"):
        merge(made, out)


def test_a_read_only_output(made: Pair, tiny_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    with pytest.raises(EnvironmentLacking, match="Read-only file system"):
        merge(made, tiny_disk)
    with pytest.raises(EnvironmentLacking, match="Read-only file system"):
        merge(made, tiny_disk / "out")


def test_a_finished_merge_on_a_read_only_disk_is_done(made: Pair, tiny_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", str(tiny_disk)], check=True)
    merge(made, tiny_disk / "out")
    (tiny_disk / "out" / LOCK).touch()
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    assert merge(made, tiny_disk / "out").skipped


@pytest.mark.parametrize("force", [False, True])
def test_an_output_that_cannot_be_a_directory(made: Pair, tmp_path: Path, force: bool) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("file", "file/out", "loop", "dangling", "x" * 300):
        with pytest.raises((UsageError, EnvironmentLacking)) as raised:
            merge(made, tmp_path / name, force=force)
        assert name[:5] in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file", "loop"]
    assert (tmp_path / "file").read_text() == "mine"


def test_two_processes_on_one_output(made: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with lock_directory(out):
        (out / ".model-00001-of-00004.safetensors.partial").write_text("of the other process")
        for force in (False, True):
            with pytest.raises(UsageError, match="another exporter process"):
                merge(made, out, force=force)
        assert {path.name for path in out.iterdir()} == {LOCK, ".model-00001-of-00004.safetensors.partial"}


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_another_process_that_finishes_between_the_look_and_the_lock(
    made: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: float
) -> None:
    """What it made is this merge, or something that must not be overwritten without --force."""
    out, original = tmp_path / "out", merging.lock_directory

    def late(directory: Path) -> Any:
        monkeypatch.setattr(merging, "lock_directory", original)
        merge(made, out, weight=[weight])
        return original(directory)

    monkeypatch.setattr(merging, "lock_directory", late)
    if weight == 1:
        assert merge(made, out, weight=[1.0]).skipped
        return
    with pytest.raises(UsageError, match="another merge"):
        merge(made, out, weight=[1.0])
    assert merge(made, out, weight=[0.5]).skipped


def test_names_with_spaces_and_of_other_scripts(tmp_path: Path, wanted: dict[str, bytes]) -> None:
    pair = make_pair(tmp_path / "a  b'\"$;\n ü 模型")
    merge(pair, tmp_path / " ö ut\t")
    assert_equals_peft(pair, tmp_path / " ö ut\t")
    got = weights_of(tmp_path / " ö ut\t")
    assert {n: d for n, d in got.items() if n != "README.md"} == {n: d for n, d in wanted.items() if n != "README.md"}


def test_inputs_that_are_links(made: Pair, tmp_path: Path, wanted: dict[str, bytes]) -> None:
    """As huggingface_hub's cache has them: links to the blobs beside the snapshot, which is reached by a link too."""
    for name, directory in (("base", made.base), ("adapter", made.adapter)):
        snapshot, blobs = tmp_path / name / "snapshots/c0ffee", tmp_path / name / "blobs"
        snapshot.mkdir(parents=True)
        shutil.copytree(directory, blobs)
        for path in blobs.iterdir():
            (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
        (tmp_path / f"{name}-link").symlink_to(snapshot)
    merge(Pair(tmp_path / "base-link", tmp_path / "adapter-link"), tmp_path / "out")
    got = weights_of(tmp_path / "out")
    assert {n: d for n, d in got.items() if n != "README.md"} == {n: d for n, d in wanted.items() if n != "README.md"}
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_an_output_that_is_a_link_to_a_directory(made: Pair, tmp_path: Path, wanted: dict[str, bytes]) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    merge(made, tmp_path / "link")
    assert weights_of(tmp_path / "real") == wanted


@pytest.mark.parametrize("force", [False, True])
def test_an_input_is_never_the_output(tmp_path: Path, force: bool) -> None:
    """With --force the base would be removed before it is written: its only copy."""
    pair = make_pair(tmp_path)
    (tmp_path / "link").symlink_to(pair.base)
    before = contents(tmp_path)
    outs = (pair.base, pair.adapter, pair.base / "merged", pair.base / "a/b", tmp_path / "link", tmp_path / "link/x")
    for out in (*outs, tmp_path / "x/../base"):
        with pytest.raises(UsageError, match="which the merge reads"):
            merge(pair, out, force=force)
    assert contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "link"]


def test_the_blobs_of_a_snapshot_are_no_output(made: Pair, tmp_path: Path) -> None:
    """What a snapshot of the hub's cache links into is the base, wherever the snapshot lies."""
    snapshot, blobs = tmp_path / "hub/snapshots/c0ffee", tmp_path / "hub/blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(made.base, blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    before = contents(blobs)
    for out in (blobs, blobs / "merged"):
        with pytest.raises(UsageError, match="which the merge reads"):
            merge(Pair(snapshot, made.adapter), out, force=True)
    assert contents(blobs) == before


def test_a_base_of_links_into_the_output(made: Pair, tmp_path: Path) -> None:
    """Links that lead out of a model's directory are refused, wherever they lead."""
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(made.base, out)
    base.mkdir()
    for path in out.iterdir():
        (base / path.name).symlink_to(path)
    before = contents(out)
    with pytest.raises(InputRefused, match="is a link that leads out of its directory"):
        merge(Pair(base, made.adapter), out, force=True)
    assert contents(out) == before


@pytest.mark.parametrize("year", [0, 4_000_000_000])
def test_a_clock_that_is_wrong(tmp_path: Path, wanted: dict[str, bytes], year: int) -> None:
    """Times are compared for equality only: in a file of 1970, or of the future, nothing is newer or older."""
    pair, out = make_pair(tmp_path), tmp_path / "out"
    for path in (*pair.base.iterdir(), *pair.adapter.iterdir()):
        os.utime(path, (year, year))
    merge(pair, out)
    assert merge(pair, out).skipped
    for path in out.iterdir():
        os.utime(path, (year, year))
    assert merge(pair, out).skipped, "other times and equal bytes: the digests decide"
    assert weights_of(out) == wanted


def test_a_finished_file_that_was_changed_with_its_old_time_and_size(made: Pair, tmp_path: Path) -> None:
    """The digest of the head tells; what no stamp can tell is left to verify-manifest."""
    out = tmp_path / "out"
    merge(made, out)
    path = out / "config.json"
    status = path.stat()
    path.write_bytes(path.read_bytes().replace(b"gelu", b"relu"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(UsageError, match="a damaged one"):
        merge(made, out)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "README.md"])
def test_a_small_input_that_changed_is_not_skipped(tmp_path: Path, name: str) -> None:
    pair = make_pair(tmp_path)
    merge(pair, tmp_path / "out")
    path = pair.base / name
    path.write_text(path.read_text() + "\n" if path.exists() else "---\nlicense: mit\n---\n")
    with pytest.raises(UsageError, match="another merge"):
        merge(pair, tmp_path / "out")


STALE = {
    "model.safetensors": "weights",
    "model.safetensors.index.json": "weights",
    "model-00001-of-00009.safetensors": "weights",
    "model.fp16.safetensors": "weights",
    "pytorch_model.bin": "weights",
    "pytorch_model.bin.index.json": "weights",
    "pytorch_model-00001-of-00002.bin": "weights",
    "chat_template.jinja": "a template that was never asked for",
    "added_tokens.json": '{"<new>": 300}',
    "tokenizer.model": "another tokenizer",
    "vocab.json": "{}",
}


def test_force_removes_what_a_loader_would_take_and_nothing_else(made: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "folder").mkdir(parents=True)
    for name, text in STALE.items():
        (out / name).write_text(text)
    (out / "thesis.txt").write_text("mine")
    before = contents(out)
    with pytest.raises(UsageError, match="something else"):
        merge(made, out)
    assert contents(out) == before
    exporter.merge(base=made.base, adapter=made.adapter, out=out, shard_size=SHARD, force=True)
    left = {name for name, text in STALE.items() if (out / name).exists() and (out / name).read_text() == text}
    assert not left - {"model.safetensors.index.json"}
    assert (out / "model.safetensors.index.json").read_text() != "weights"
    assert (out / "thesis.txt").read_text() == "mine"
    assert (out / "folder").is_dir()
    assert_equals_peft(made, out)


def test_force_does_not_replace_what_it_cannot_finish(tmp_path: Path) -> None:
    """A refusal leaves what the directory held, the old checkpoint of --force too."""
    pair, out = make_pair(tmp_path), tmp_path / "out"
    merge(pair, out)
    before = contents(out)
    data = bytearray((pair.base / "model.safetensors").read_bytes())
    data[-1] = 0x7F  # the exponent of the last float16 becomes that of NaN
    data[-2] = 0xFF
    (pair.base / "model.safetensors").write_bytes(data)
    with pytest.raises(InputRefused, match="NaN"):
        merge(pair, out, force=True)
    assert contents(out) == before


@pytest.mark.parametrize("force", [False, True])
def test_an_adapter_in_the_output_is_not_merged_over(made: Pair, tmp_path: Path, force: bool) -> None:
    """transformers would load the adapter's base instead of the merged weights, and the adapter on top."""
    out = tmp_path / "out"
    shutil.copytree(made.adapter, out)
    before = contents(out)
    with pytest.raises(UsageError, match="holds an adapter"):
        merge(made, out, force=force)
    assert contents(out) == before


def test_a_lock_file_is_no_leave_to_overwrite(made: Pair, tmp_path: Path) -> None:
    """A native export that was killed leaves one in the user's own model directory."""
    out = tmp_path / "out"
    shutil.copytree(made.base, out)
    (out / LOCK).touch()
    before = contents(out)
    with pytest.raises(UsageError, match="something else"):
        merge(made, out)
    assert {**contents(out), LOCK: b""} == before


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": 9, "stages": {}}', '{"format": 1, "stages": {"merge": []}}',
             '{"format": 1, "stages": {"merge": {"files": ["a"]}}}', "\xff"]
)  # fmt: skip
def test_a_manifest_that_cannot_be_read(made: Pair, tmp_path: Path, wanted: dict[str, bytes], text: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / MANIFEST).write_text(text, "latin-1")
    with pytest.raises(UsageError, match=MANIFEST):
        merge(made, out)
    merge(made, out, force=True)
    assert weights_of(out) == wanted


def test_a_manifest_that_lists_files_elsewhere(made: Pair, tmp_path: Path) -> None:
    """A copied or hostile manifest must not make --force remove what lies outside of the output."""
    out, mine = tmp_path / "out", tmp_path / "mine"
    out.mkdir()
    mine.write_text("mine")
    names = ("../mine", str(mine), "folder/inside")
    (out / "folder").mkdir()
    (out / "folder/inside").write_text("mine")
    entries = ", ".join(f'"{name}": {{}}' for name in names)
    (out / MANIFEST).write_text(f'{{"format": 1, "stages": {{"merge": {{"files": {{{entries}}}}}}}}}')
    merge(made, out, force=True)
    assert mine.read_text() == (out / "folder/inside").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"adapter": []}, "no adapter"),
        ({"weight": [1, 2]}, "2 weights"),
        ({"weight": [float("nan")]}, "weight"),
        ({"weight": [float("inf")]}, "weight"),
        ({"proof": "some"}, "proof"),
        ({"dtype": "int8"}, "dtype"),
        ({"onto": "int4"}, "onto"),
        ({"shard_size": 0}, "shard-size"),
        ({"template": "vicuna"}, "template"),
    ],
)
def test_arguments_that_cannot_be_meant(made: Pair, tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match) as raised:
        merge(made, tmp_path / "a/b/out", **changes)
    assert raised.value.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_a_refusal_takes_away_the_parents_it_made(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, gpt2_config(n_layer=1))
    edit_json(pair.base / "tokenizer.json", model=5)
    for path in pair.base.glob("*token*"):
        path.unlink()
    with pytest.raises(InputRefused, match="no tokenizer"):
        merge(pair, tmp_path / "a/b/out")
    assert not (tmp_path / "a").exists()
