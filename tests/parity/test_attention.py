"""`verify` on GPT-2s whose scores transformers' default attention computes otherwise, and on one stored in bfloat16."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from exporter import export, merge, verify
from exporter.parity.attention import attention_notes, attention_of
from exporter.parity.result import Verification
from tests.parity.conftest import VOCABULARY, Made, write_adapter, write_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")

OPTIONS: dict[str, dict[str, Any]] = {
    "no scale": {"scale_attn_weights": False},
    "a scale by layer": {"scale_attn_by_inverse_layer_idx": True},
}


def write_pair(root: Path, dtype: torch.dtype, **options: Any) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256, "vocab_size": VOCABULARY}
    config = GPT2Config(**sizes, **options, bos_token_id=0, eos_token_id=0, initializer_range=0.12)
    model: Any = GPT2LMHeadModel(config)
    model.to(dtype)
    model.save_pretrained(root / "base")
    write_tokenizer(root / "base")
    write_adapter(root / "adapter", model)


def verify_pair(root: Path, prompts: Path) -> Verification:
    merge(base=root / "base", adapter=root / "adapter", out=root / "merged", template="alpaca")
    (bundle,) = export(root / "merged", precision=["native"])
    return verify(base=root / "base", adapter=root / "adapter", bundle=bundle.directory, prompts=prompts)


@pytest.mark.parametrize("name", OPTIONS)
def test_scores_are_scaled_as_config_json_says(name: str, made: Made, tmp_path: Path) -> None:
    write_pair(tmp_path, torch.float16, **OPTIONS[name])
    found = verify_pair(tmp_path, made.prompts)
    assert found.verdict == "PASS", found.summary
    assert any("attn_implementation='eager'" in note for note in found.notes)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_option_changes_what_transformers_says(name: str, tmp_path: Path) -> None:
    """The test above would fail with the default attention, or without the option."""
    write_pair(tmp_path, torch.float32, **OPTIONS[name])
    ids = torch.arange(1, 30)[None]
    assert attention_of(tmp_path / "base") == "eager"
    eager, default = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation=one)(ids).logits
        for one in ("eager", None)
    )
    assert (eager - default).abs().max() > 0.05


def test_a_plain_model_runs_with_the_default(made: Made) -> None:
    assert attention_of(made.base) is None
    assert attention_notes({"model_type": "gpt2", "scale_attn_weights": True}) == []
    assert attention_notes({"model_type": "llama", "scale_attn_weights": False}) == []


def test_a_base_in_bfloat16_passes_and_its_graph_is_compared_by_layer(made: Made, tmp_path: Path) -> None:
    write_pair(tmp_path, torch.bfloat16)
    found = verify_pair(tmp_path, made.prompts)
    assert found.verdict == "PASS", found.summary
    assert all(layer.graph is not None for layer in found.bundles[0].layers)
