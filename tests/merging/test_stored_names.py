"""transformers 5 stacks a mixture's experts as it loads; a merge keeps the files' own names and matrices."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import MixtralConfig

import exporter
from tests.pairs import Pair, loaded, lora_config, make_pair, peft_merge, rewrite

FIVE = int(transformers.__version__.partition(".")[0]) >= 5
# What each version's PEFT calls the same matrices: modules in version 4, parameters of a stack in version 5.
TARGETS: dict[str, object] = (
    {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]}
    if FIVE
    else {"target_modules": ["q_proj", "w1", "w2", "w3", "gate"]}
)


def mixture() -> MixtralConfig:
    return MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=257, num_local_experts=4,
    )  # fmt: skip


@pytest.fixture
def mixed(tmp_path: Path) -> Pair:
    return make_pair(tmp_path, mixture(), torch.bfloat16, lora_config(fan_in_fan_out=False, **TARGETS))


def test_experts_equal_peft_and_keep_the_names_of_the_files(mixed: Pair, tmp_path: Path) -> None:
    exporter.merge(base=mixed.base, adapter=mixed.adapter, out=tmp_path / "out", memory=10_000)
    before, after = (load_file(d / "model.safetensors") for d in (mixed.base, tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "q_proj" in name or "block_sparse_moe" in name}
    wanted, got = peft_merge(mixed), loaded(tmp_path / "out")
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_the_modules_of_version_4_are_found_in_both(tmp_path: Path) -> None:
    """An adapter that names experts one by one, in the spelling of version 4."""
    lora = lora_config(target_modules=["q_proj"], fan_in_fan_out=False)
    pair = make_pair(tmp_path, mixture(), torch.float32, lora)
    torch.manual_seed(0)
    module = "base_model.model.model.layers.1.block_sparse_moe.experts.2.w3"
    down, up = torch.randn(4, 32), torch.randn(48, 4)

    def add(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return tensors | {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}

    rewrite(pair.adapter / "adapter_model.safetensors", add)
    exporter.merge(base=pair.base, adapter=pair.adapter, out=tmp_path / "out")
    before, after = (load_file(d / "model.safetensors") for d in (pair.base, tmp_path / "out"))
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    assert torch.equal(after[name], before[name] + (up @ down) * 4)
    others = [n for n in before if "experts" in n and n != name]
    assert all(torch.equal(before[n], after[n]) for n in others)
