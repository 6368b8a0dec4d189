"""`verify` on models with rotary embeddings: they know distances between positions only."""

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from peft import LoraConfig
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from exporter import export, merge, verify
from tests.parity.conftest import VOCABULARY, Made, update_manifest, write_tokenizer
from tests.parity.test_methods import write_random_adapter

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}
CONFIG = GPTNeoXConfig(**SIZES, rotary_pct=0.5)


def make_bundle(tmp_path: Path) -> Path:
    """A merged GPT-NeoX with its graph, base and adapter beside it."""
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
    return bundle.directory


def test_a_right_bundle_passes_and_shifted_positions_are_found(made: Made, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    found = verify(base=tmp_path / "base", adapter=tmp_path / "adapter", bundle=bundle, prompts=made.prompts)
    (context,) = (gate for gate in found.bundles[0].gates if gate.gate == "graph.context")
    assert (context.outcome, context.tokens) == ("PASS", 16)
    outcomes = {mutant.name: mutant.outcome for mutant in found.bundles[0].mutants}
    assert outcomes["positions + 1"] == "killed", outcomes
    assert found.verdict == "PASS", found.summary


def test_angles_that_are_wrong_beyond_the_longest_document_are_found(made: Made, tmp_path: Path) -> None:
    """However it is fed, such a graph agrees with itself."""
    bundle = make_bundle(tmp_path)
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.name in ("rotary.cos", "rotary.sin"):
            values = numpy_helper.to_array(tensor).copy()
            values[900:] = values[0]  # no document is as long
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    (bundle / "model.onnx").write_bytes(model.SerializeToString())
    update_manifest(bundle, "model.onnx")
    found = verify(base=tmp_path / "base", adapter=tmp_path / "adapter", bundle=bundle, prompts=made.prompts)
    failed = {gate.gate for gate in found.bundles[0].gates if gate.outcome == "FAIL"}
    assert failed == {"graph.context"}
    assert found.bundles[0].origin is not None
    assert found.bundles[0].origin.stage == "graph"
