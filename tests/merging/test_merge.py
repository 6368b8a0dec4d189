"""A merge equals PEFT's own in float32, rounded once, and says what it did."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaConfig
from transformers.pytorch_utils import Conv1D

import exporter
from exporter.errors import EnvironmentLacking, InputRefused, UsageError
from exporter.manifest import read_manifest
from tests.pairs import (
    Pair,
    as_bin,
    edit_json,
    gpt2_config,
    loaded,
    lora_config,
    make_pair,
    peft_merge,
    rewrite,
    save_adapter,
)


def assert_equals_peft(pair: Pair, out: Path) -> None:
    wanted, got = peft_merge(pair), loaded(out)
    assert set(wanted) == set(got)
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_equals_peft_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    pair = make_pair(tmp_path, dtype=dtype)
    exporter.merge(base=pair.base, adapter=pair.adapter, out=tmp_path / "out")
    assert_equals_peft(pair, tmp_path / "out")


@pytest.mark.parametrize("width", [64, 96, 200])
@pytest.mark.parametrize("memory", [10_000, 10**9])
def test_blocks_of_rows_do_not_change_a_bit(tmp_path: Path, width: int, memory: int) -> None:
    pair = make_pair(tmp_path, gpt2_config(n_embd=width, n_head=2))
    exporter.merge(base=pair.base, adapter=pair.adapter, out=tmp_path / "out", memory=memory)
    assert_equals_peft(pair, tmp_path / "out")


def test_every_conv1d_of_gpt2_among_them_square_ones(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, lora=lora_config(target_modules=["c_attn", "c_proj", "c_fc"]))
    exporter.merge(base=pair.base, adapter=pair.adapter, out=tmp_path / "out")
    assert_equals_peft(pair, tmp_path / "out")


def test_orientation_comes_from_the_class_and_not_from_fan_in_fan_out(tmp_path: Path) -> None:
    """An 8-bit base makes PEFT write fan_in_fan_out false for a Conv1D; a square c_proj fits both ways."""
    pair = make_pair(tmp_path, lora=lora_config(target_modules=["attn.c_proj"]))
    wanted = peft_merge(pair)
    edit_json(pair.adapter / "adapter_config.json", fan_in_fan_out=False)
    exporter.merge(base=pair.base, adapter=pair.adapter, out=tmp_path / "out")
    got = loaded(tmp_path / "out")
    name = "transformer.h.0.attn.c_proj.weight"
    assert torch.equal(got[name], wanted[name])
    assert not torch.equal(got[name], load_file(pair.base / "model.safetensors")[name])


def test_linear_layers_of_llama(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=257, tie_word_embeddings=False,
    )  # fmt: skip
    lora = lora_config(target_modules=["q_proj", "v_proj", "down_proj"], fan_in_fan_out=False)
    pair = make_pair(tmp_path, config, torch.bfloat16, lora)
    exporter.merge(base=pair.base, adapter=pair.adapter, out=tmp_path / "out")
    assert_equals_peft(pair, tmp_path / "out")


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"rank_pattern": {"h.1.attn.c_attn": 8}, "alpha_pattern": {"c_attn": 2}},
        {"r": 1},
        {"layers_to_transform": [1], "layers_pattern": "h"},
    ],
    ids=["rslora", "patterns", "rank one", "one layer"],
)
def test_scales_and_ranks(tmp_path: Path, changes: dict[str, object]) -> None:
    pair = make_pair(tmp_path, lora=lora_config(**changes))
    exporter.merge(base=pair.base, adapter=pair.adapter, out=tmp_path / "out")
    assert_equals_peft(pair, tmp_path / "out")


def test_several_adapters_are_summed_before_one_rounding(tmp_path: Path) -> None:
    from peft import PeftModel

    pair = make_pair(tmp_path)
    second = tmp_path / "second"
    save_adapter(second, GPT2LMHeadModel.from_pretrained(pair.base), lora_config(r=2), seed=5)
    exporter.merge(base=pair.base, adapter=[pair.adapter, second], weight=[0.5, -1.25], out=tmp_path / "out")
    model = PeftModel.from_pretrained(
        GPT2LMHeadModel.from_pretrained(pair.base, dtype=torch.float32), str(pair.adapter), "a"
    )
    model.load_adapter(str(second), "b")
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "get_delta_weight")]
    got = loaded(tmp_path / "out")
    for number, layer in enumerate(layers):
        base = layer.get_base_layer().weight.data
        wanted = (base + 0.5 * layer.get_delta_weight("a") - 1.25 * layer.get_delta_weight("b")).half()
        assert torch.equal(got[f"transformer.h.{number}.attn.c_attn.weight"], wanted)


@pytest.mark.parametrize("shards", [1, 3])
def test_the_files_of_2023(tmp_path: Path, shards: int) -> None:
    """Sharded .bin with attention buffers and a stored tied head; the adapter as adapter_model.bin."""
    pair = make_pair(tmp_path)
    exporter.merge(base=pair.base, adapter=pair.adapter, out=tmp_path / "new")
    as_bin(pair.base, shards=shards, old_buffers=True)
    torch.save(load_file(pair.adapter / "adapter_model.safetensors"), pair.adapter / "adapter_model.bin")
    (pair.adapter / "adapter_model.safetensors").unlink()
    edit_json(pair.adapter / "adapter_config.json", enable_lora=None, merge_weights=False)
    result = exporter.merge(base=pair.base, adapter=pair.adapter, out=tmp_path / "old")
    assert (tmp_path / "old/model.safetensors").read_bytes() == (tmp_path / "new/model.safetensors").read_bytes()
    assert "lm_head.weight" in result.section["dropped"]
    assert "transformer.h.0.attn.masked_bias" in result.section["dropped"]


def test_names_without_the_prefix(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    exporter.merge(base=pair.base, adapter=pair.adapter, out=tmp_path / "with")
    rewrite(
        pair.base / "model.safetensors", lambda tensors: {n.removeprefix("transformer."): t for n, t in tensors.items()}
    )
    exporter.merge(base=pair.base, adapter=pair.adapter, out=tmp_path / "without")
    names = "model.safetensors"
    assert (tmp_path / "with" / names).read_bytes() == (tmp_path / "without" / names).read_bytes()


def test_adapter_names_with_an_adapter_name_and_a_nested_prefix(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    exporter.merge(base=pair.base, adapter=pair.adapter, out=tmp_path / "plain")

    def rename(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {f"base_model.model.{n}".replace(".weight", ".default.weight"): t for n, t in tensors.items()}

    rewrite(pair.adapter / "adapter_model.safetensors", rename)
    exporter.merge(base=pair.base, adapter=pair.adapter, out=tmp_path / "nested")
    names = "model.safetensors"
    assert (tmp_path / "plain" / names).read_bytes() == (tmp_path / "nested" / names).read_bytes()


def test_untouched_tensors_are_the_bases_bytes_and_changed_ones_are_not(pair: Pair, tmp_path: Path) -> None:
    result = exporter.merge(base=pair.base, adapter=pair.adapter, out=tmp_path / "out")
    before, after = load_file(pair.base / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    changed = {
        name for name in before if not torch.equal(before[name].view(torch.int16), after[name].view(torch.int16))
    }
    assert changed == {tensor.name for tensor in result.plan.changed}
    assert changed == {f"transformer.h.{layer}.attn.c_attn.weight" for layer in range(3)}


def test_shards_and_index_are_what_save_pretrained_writes(pair: Pair, tmp_path: Path) -> None:
    """Of transformers 4, whichever is installed: 5 fills its shards in the order of names."""
    model = AutoModelForCausalLM.from_pretrained(pair.base, dtype="auto")
    model.save_pretrained(tmp_path / "oracle", max_shard_size="150KB")
    exporter.merge(base=pair.base, adapter=pair.adapter, out=tmp_path / "out", shard_size=150_000)
    name = "model.safetensors.index.json"
    wanted, got = ((tmp_path / d / name).read_text() for d in ("oracle", "out"))
    if transformers.__version__.startswith("4."):
        assert got == wanted
    assert json.loads(got)["metadata"] == json.loads(wanted)["metadata"]
    assert set(json.loads(got)["weight_map"]) == set(json.loads(wanted)["weight_map"])
    assert_equals_peft(pair, tmp_path / "out")


def test_large_tensors_start_at_pages_and_the_library_reads_the_file(pair: Pair, tmp_path: Path) -> None:
    result = exporter.merge(base=pair.base, adapter=pair.adapter, out=tmp_path / "out")
    path = tmp_path / "out/model.safetensors"
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])
    pages = {n: (8 + length + e["data_offsets"][0]) % 4096 for n, e in header.items() if n != "__metadata__"}
    big = [n for n, e in header.items() if n != "__metadata__" and e["data_offsets"][1] - e["data_offsets"][0] >= 4096]
    assert [name for name in big if pages[name]] == result.section["unaligned"] == []
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_dtype_converts_every_float_and_the_config(pair: Pair, tmp_path: Path) -> None:
    exporter.merge(base=pair.base, adapter=pair.adapter, out=tmp_path / "out", dtype="float32")
    got = load_file(tmp_path / "out/model.safetensors")
    assert {tensor.dtype for tensor in got.values()} == {torch.float32}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "float32"


def test_overflowing_tensors_are_refused_by_name(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, dtype=torch.float32)

    def overflow(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["transformer.h.1.mlp.c_fc.weight"][3, 4] = 70000.0
        return tensors

    rewrite(pair.base / "model.safetensors", overflow)
    with pytest.raises(InputRefused, match=r"h\.1\.mlp\.c_fc\.weight.*overflows"):
        exporter.merge(base=pair.base, adapter=pair.adapter, out=tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["base", "adapter"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(pair: Pair, tmp_path: Path, where: str, value: float) -> None:
    path = pair.base / "model.safetensors" if where == "base" else pair.adapter / "adapter_model.safetensors"

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[sorted(tensors)[1]].view(-1)[5] = value
        return tensors

    rewrite(path, spoil)
    with pytest.raises(InputRefused, match="NaN or infinity"):
        exporter.merge(base=pair.base, adapter=pair.adapter, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_same_merge_again_does_nothing_and_another_needs_force(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = exporter.merge(base=pair.base, adapter=pair.adapter, out=out)
    inode = (out / "model.safetensors").stat().st_ino
    again = exporter.merge(base=pair.base, adapter=pair.adapter, out=out)
    assert (first.skipped, again.skipped) == (False, True)
    assert (out / "model.safetensors").stat().st_ino == inode
    with pytest.raises(UsageError, match="another merge"):
        exporter.merge(base=pair.base, adapter=pair.adapter, out=out, weight=[0.5])
    assert (out / "model.safetensors").stat().st_ino == inode
    exporter.merge(base=pair.base, adapter=pair.adapter, out=out, weight=[0.5], force=True)
    assert (out / "model.safetensors").stat().st_ino != inode


def test_a_directory_with_something_else_is_left_alone(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"thesis\.txt"):
        exporter.merge(base=pair.base, adapter=pair.adapter, out=out)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_no_disk_space_is_seen_before_writing(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(EnvironmentLacking, match=r"1\.0 kB are free"):
        exporter.merge(base=pair.base, adapter=pair.adapter, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_manifest_has_a_true_digest_of_every_file_and_tensor(pair: Pair, tmp_path: Path) -> None:
    import hashlib

    out = tmp_path / "out"
    exporter.merge(base=pair.base, adapter=pair.adapter, out=out, template="alpaca")
    manifest = read_manifest(out)
    assert manifest is not None
    section = manifest["stages"]["merge"]
    on_disk = {path.name for path in out.iterdir()} - {"exporter.json"}
    assert set(section["files"]) == on_disk
    for name, entry in section["files"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == entry["sha256"]
    for name, tensor in load_file(out / "model.safetensors").items():
        assert hashlib.sha256(tensor.numpy().tobytes()).hexdigest() == section["tensors"][name]["sha256"]


def test_two_merges_give_the_same_bytes(pair: Pair, tmp_path: Path) -> None:
    for name in ("one", "two"):
        exporter.merge(base=pair.base, adapter=pair.adapter, out=tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        if path.name != "exporter.json":
            assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_the_oracle_has_conv1d() -> None:
    """If transformers turned GPT-2's Conv1D into Linear, the orientation tests above would prove nothing."""
    modules = dict(GPT2LMHeadModel(gpt2_config()).named_modules())
    assert isinstance(modules["transformer.h.0.attn.c_attn"], Conv1D)
