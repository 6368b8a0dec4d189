"""The base's bytes come back: by arithmetic where rounding allows, else from the base, always by their digests."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import exporter
from exporter.errors import EnvironmentLacking, InputRefused, UsageError
from exporter.manifest import read_manifest
from exporter.merging import shards, unmerge
from tests.pairs import Pair, lora_config, make_pair, rewrite

ADAPTER = "adapter_model.safetensors"


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_base_is_back(pair: Pair, restored: Path) -> None:
    before, after = weights(pair.base), weights(restored)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (restored / "config.json").read_bytes() == (pair.base / "config.json").read_bytes()


def on_a_grid(pair: Pair) -> None:
    """Weights and factors of few bits: no sum is rounded, so a subtraction undoes every addition."""
    torch.manual_seed(3)

    def coarse(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: (torch.randint(-64, 65, t.shape) / 512).to(t.dtype) for n, t in tensors.items()}

    rewrite(pair.base / "model.safetensors", coarse)
    rewrite(pair.adapter / ADAPTER, lambda ts: {n: torch.randint(1, 3, t.shape) / 64.0 for n, t in ts.items()})


def test_by_arithmetic_where_no_bit_was_lost(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, dtype=torch.float32)
    on_a_grid(pair)
    exporter.merge(base=pair.base, adapter=pair.adapter, out=tmp_path / "merged", shard_size=100_000)
    assert not torch.equal(
        weights(tmp_path / "merged")["transformer.h.0.attn.c_attn.weight"],
        weights(pair.base)["transformer.h.0.attn.c_attn.weight"],
    )
    result = exporter.unmerge(tmp_path / "merged", adapter=pair.adapter, out=tmp_path / "restored")
    assert len(result.computed) == 3
    assert result.from_base == ()
    assert_base_is_back(pair, tmp_path / "restored")
    assert not list((tmp_path / "restored").glob(".*"))


def test_what_rounding_took_is_refused_by_name_and_comes_from_the_base(pair: Pair, tmp_path: Path) -> None:
    exporter.merge(base=pair.base, adapter=pair.adapter, out=tmp_path / "merged")
    with pytest.raises(InputRefused, match=r"c_attn\.weight.*\n(.|\n)*--base"):
        exporter.unmerge(tmp_path / "merged", adapter=pair.adapter, out=tmp_path / "restored")
    assert not (tmp_path / "restored").exists()
    result = exporter.unmerge(tmp_path / "merged", adapter=pair.adapter, out=tmp_path / "restored", base=pair.base)
    assert len(result.from_base) == 3
    assert_base_is_back(pair, tmp_path / "restored")


@pytest.mark.parametrize("change", [{"use_dora": True}, {"modules_to_save": ["ln_f"]}, {"lora_bias": True}])
def test_other_methods_come_from_the_base(tmp_path: Path, change: dict[str, object]) -> None:
    pair = make_pair(tmp_path, lora=lora_config(**change))
    rewrite(pair.adapter / ADAPTER, lambda ts: {n: t + 0.01 for n, t in ts.items()})
    exporter.merge(base=pair.base, adapter=pair.adapter, out=tmp_path / "merged")
    exporter.unmerge(tmp_path / "merged", adapter=pair.adapter, out=tmp_path / "restored", base=pair.base)
    assert_base_is_back(pair, tmp_path / "restored")


def test_what_other_inputs_began_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after shards that arithmetic could not restore; then the base is given too."""
    pair = make_pair(tmp_path)
    exporter.merge(base=pair.base, adapter=pair.adapter, out=tmp_path / "merged", shard_size=100_000)
    out, check = tmp_path / "restored", unmerge._check_digests

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(unmerge, "_check_digests", interrupted)
    with pytest.raises(KeyboardInterrupt):
        exporter.unmerge(tmp_path / "merged", adapter=pair.adapter, out=out)
    monkeypatch.setattr(unmerge, "_check_digests", check)
    exporter.unmerge(tmp_path / "merged", adapter=pair.adapter, base=pair.base, out=out)
    assert_base_is_back(pair, out)
    assert not list(out.glob(".*.partial"))


def test_a_full_disk_leaves_finished_shards_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_pair(tmp_path, dtype=torch.float32)
    on_a_grid(pair)
    exporter.merge(base=pair.base, adapter=pair.adapter, out=tmp_path / "merged", shard_size=100_000)
    out, write = tmp_path / "restored", shards.write_shard
    begun: list[Path] = []

    def full(path: Path, *rest: Any, **options: Any) -> Any:
        begun.append(path)
        if len(begun) == 3:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, *rest, **options)

    monkeypatch.setattr(shards, "write_shard", full)
    with pytest.raises(EnvironmentLacking):
        exporter.unmerge(tmp_path / "merged", adapter=pair.adapter, out=out)
    assert not begun[2].exists()
    monkeypatch.setattr(shards, "write_shard", write)
    exporter.unmerge(tmp_path / "merged", adapter=pair.adapter, out=out)
    assert_base_is_back(pair, out)


def test_another_adapter_or_another_base_is_noticed(tmp_path: Path) -> None:
    pair, other = make_pair(tmp_path, dtype=torch.float32), make_pair(tmp_path / "other", dtype=torch.float32)
    on_a_grid(pair)
    exporter.merge(base=pair.base, adapter=pair.adapter, out=tmp_path / "merged")
    for base in (None, other.base):
        with pytest.raises(InputRefused, match="cannot be restored"):
            exporter.unmerge(tmp_path / "merged", adapter=other.adapter, out=tmp_path / "restored", base=base)
        assert not (tmp_path / "restored").exists()


def test_a_directory_that_is_no_proven_merge(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="proven merge"):
        exporter.unmerge(pair.base, adapter=pair.adapter, out=tmp_path / "restored")
    exporter.merge(base=pair.base, adapter=pair.adapter, out=tmp_path / "quick", proof="none")
    with pytest.raises(InputRefused, match="proven merge"):
        exporter.unmerge(tmp_path / "quick", adapter=pair.adapter, out=tmp_path / "restored")


def test_the_manifest_says_what_was_restored(pair: Pair, tmp_path: Path) -> None:
    exporter.merge(base=pair.base, adapter=pair.adapter, out=tmp_path / "merged")
    exporter.unmerge(tmp_path / "merged", adapter=pair.adapter, out=tmp_path / "restored", base=pair.base)
    manifest = read_manifest(tmp_path / "restored")
    assert manifest is not None
    assert len(manifest["stages"]["unmerge"]["tensors"]) == 40
    inode = (tmp_path / "restored/model.safetensors").stat().st_ino
    again = exporter.unmerge(tmp_path / "merged", adapter=pair.adapter, out=tmp_path / "restored", base=pair.base)
    assert len(again.from_base) == 3
    assert (tmp_path / "restored/model.safetensors").stat().st_ino == inode, "what is done was made again"
    (tmp_path / "restored/config.json").write_text("{}")
    with pytest.raises(UsageError, match="not an empty directory"):
        exporter.unmerge(tmp_path / "merged", adapter=pair.adapter, out=tmp_path / "restored", base=pair.base)
