"""Every model is called with the mask that generate gives it."""

from typing import Any

import pytest
import torch
import transformers
from transformers import masking_utils

from exporter.parity.forward import forward

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
CONFIGS: dict[str, Any] = {
    "gpt2": transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32),
    "llama": transformers.LlamaConfig(**SIZES, intermediate_size=64),
    "opt": transformers.OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32),
    "bloom": transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64),
    "gpt_neox": transformers.GPTNeoXConfig(**SIZES, intermediate_size=64),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_logits_are_those_of_a_call_without_a_mask(name: str) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    ids = torch.randint(4, 64, (2, 24))
    with torch.inference_mode():
        found, expected = forward(model, ids).logits, model(input_ids=ids).logits
        other = model(input_ids=ids, attention_mask=torch.ones_like(ids).index_fill(1, torch.tensor(0), 0)).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (found - other).abs().max() > 1e-4  # the comparison sees a token that is masked


def test_no_packed_documents_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def looked(*_: object) -> None:
        raise AssertionError("a mask is built in each call")

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", looked)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["gpt2"]).eval()
    forward(model, torch.zeros((1, 4), dtype=torch.long))
    with pytest.raises(AssertionError, match="in each call"):
        model(input_ids=torch.zeros((1, 4), dtype=torch.long), use_cache=False)
