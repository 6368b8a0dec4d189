"""`verify` on models with rotary embeddings: they know distances between positions only."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from exporter import export, merge, verify
from tests.parity.conftest import VOCABULARY, Made, write_tokenizer
from tests.parity.test_methods import write_random_adapter

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
CONFIG = GPTNeoXConfig(**SIZES, rotary_pct=0.5)


def test_a_right_bundle_passes_and_shifted_positions_are_found(made: Made, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.05
    model.half().save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=["query_key_value"])
    write_random_adapter(tmp_path / "adapter", tmp_path / "base", lora, lambda model: None, scale=0.05)
    merge(base=tmp_path / "base", adapter=tmp_path / "adapter", out=tmp_path / "merged", template="alpaca")
    (bundle,) = export(tmp_path / "merged", precision=["native"])
    found = verify(base=tmp_path / "base", adapter=tmp_path / "adapter", bundle=bundle.directory, prompts=made.prompts)
    outcomes = {mutant.name: mutant.outcome for mutant in found.bundles[0].mutants}
    assert outcomes["positions + 1"] == "killed", outcomes
    assert found.verdict == "PASS", found.summary
