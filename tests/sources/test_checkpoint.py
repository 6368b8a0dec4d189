"""A directory's weights by name: shards and index agree, and nothing outside the directory is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from exporter.errors import InputRefused
from exporter.sources.checkpoint import open_checkpoint
from exporter.sources.values import read_tensor
from tests.pairs import Pair, as_bin


@pytest.mark.parametrize("layout", ["safetensors", "bin", "shards of bin"])
def test_every_layout_gives_the_same_tensors(pair: Pair, layout: str) -> None:
    wanted = load_file(pair.base / "model.safetensors")
    if layout != "safetensors":
        as_bin(pair.base, shards=1 if layout == "bin" else 4, old_buffers=True)
        wanted |= {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4).half() for i in range(3)}
        wanted |= {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8).tril() for i in range(3)}
        wanted["lm_head.weight"] = wanted["transformer.wte.weight"]
    checkpoint = open_checkpoint(pair.base)
    assert set(checkpoint.tensors) == set(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(read_tensor(checkpoint.tensors[name]), tensor)
    assert checkpoint.config["model_type"] == "gpt2"


def test_a_missing_shard_is_named(pair: Pair) -> None:
    as_bin(pair.base, shards=3)
    (pair.base / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(InputRefused, match="00002-of-00003"):
        open_checkpoint(pair.base)


@pytest.mark.parametrize("name", ["../secret.bin", "/etc/passwd", "a/b.bin", "..", "", 7, None])
def test_an_index_names_only_files_beside_it(pair: Pair, name: object) -> None:
    as_bin(pair.base, shards=2)
    path = pair.base / "pytorch_model.bin.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["transformer.ln_f.bias"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(InputRefused, match="inside the directory"):
        open_checkpoint(pair.base)


def test_an_index_that_lies_is_refused(pair: Pair) -> None:
    as_bin(pair.base, shards=2)
    path = pair.base / "pytorch_model.bin.index.json"
    index = json.loads(path.read_text())
    first, second = sorted(set(index["weight_map"].values()))
    for name, file in index["weight_map"].items():
        index["weight_map"][name] = second if file == first else first
    path.write_text(json.dumps(index))
    with pytest.raises(InputRefused, match="does not hold it"):
        open_checkpoint(pair.base)


def test_of_two_sets_of_weights_the_one_that_transformers_reads_counts(pair: Pair) -> None:
    single = load_file(pair.base / "model.safetensors")
    first, *rest = single
    halves = {"model-00001-of-00002.safetensors": [first], "model-00002-of-00002.safetensors": rest}
    for file, names in halves.items():
        save_file({name: single[name] + 1 for name in names}, pair.base / file)
    index = {"weight_map": {name: file for file, names in halves.items() for name in names}}
    (pair.base / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = GPT2LMHeadModel.from_pretrained(pair.base).state_dict()
    checkpoint = open_checkpoint(pair.base)
    assert [file.name for file in checkpoint.files] == ["model.safetensors"]
    for name, info in checkpoint.tensors.items():
        assert torch.equal(read_tensor(info), loaded[name])
