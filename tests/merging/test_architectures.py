"""LoRA on all linear layers of many architectures: PEFT's bits, and a checkpoint that transformers loads whole."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file

from exporter.errors import InputRefused
from tests.merging.oracle import TOKENS, assert_merged_as_peft, make_random_pair, merge, stored

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


@dataclass(frozen=True)
class Architecture:
    """targets: all its linear layers but the head, by name."""

    model: str
    config: str
    targets: str
    dtype: torch.dtype
    sizes: dict[str, Any]


DEPTH = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32}
WIDE = {**DEPTH, "intermediate_size": 48, "max_position_embeddings": 32}
GROUPED = {**WIDE, "num_key_value_heads": 1, "head_dim": 16}
LLAMA = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
BERT = "query key value dense"
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
ARCHITECTURES = {
    "gpt2": Architecture(
        "GPT2LMHeadModel", "GPT2Config", "c_attn c_proj c_fc", F16, {"n_embd": 32, "n_layer": 2, "n_head": 2}
    ),
    "gpt-neox": Architecture(
        "GPTNeoXForCausalLM", "GPTNeoXConfig", "query_key_value dense dense_h_to_4h dense_4h_to_h", F16, WIDE
    ),
    "opt": Architecture(
        "OPTForCausalLM",
        "OPTConfig",
        "q_proj k_proj v_proj out_proj fc1 fc2 project_in project_out",
        F16,
        {**DEPTH, "ffn_dim": 48, "word_embed_proj_dim": 16, "max_position_embeddings": 32},
    ),
    "llama": Architecture("LlamaForCausalLM", "LlamaConfig", LLAMA, BF16, GROUPED),
    "mistral": Architecture("MistralForCausalLM", "MistralConfig", LLAMA, BF16, GROUPED),
    "qwen2": Architecture("Qwen2ForCausalLM", "Qwen2Config", LLAMA, BF16, GROUPED),
    "qwen3": Architecture("Qwen3ForCausalLM", "Qwen3Config", LLAMA, F32, {**GROUPED, "tie_word_embeddings": True}),
    "gemma": Architecture("GemmaForCausalLM", "GemmaConfig", LLAMA, BF16, GROUPED),
    "phi": Architecture("PhiForCausalLM", "PhiConfig", "q_proj k_proj v_proj dense fc1 fc2", F16, WIDE),
    "falcon": Architecture(
        "FalconForCausalLM", "FalconConfig", "query_key_value dense dense_h_to_4h dense_4h_to_h", BF16, DEPTH
    ),
    "mixtral": Architecture(
        "MixtralForCausalLM",
        "MixtralConfig",
        "q_proj k_proj v_proj o_proj gate w1 w2 w3",
        BF16,
        {**GROUPED, "num_local_experts": 3},
    ),
    "t5": Architecture(
        "T5ForConditionalGeneration",
        "T5Config",
        "q k v o wi wo",
        F32,
        {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 256},
    ),
    "bert": Architecture("BertForMaskedLM", "BertConfig", BERT, F32, WIDE),
    "bert-classifier": Architecture("BertForSequenceClassification", "BertConfig", BERT + " classifier", F16, WIDE),
}
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=list(ARCHITECTURES))


@each_architecture
@pytest.mark.parametrize("by_name", [False, True], ids=["all-linear", "by name"])
def test_all_linear_layers(tmp_path: Path, architecture: Architecture, by_name: bool) -> None:
    config = getattr(transformers, architecture.config)(**architecture.sizes, **TOKENS)
    targets = architecture.targets.split() if by_name else "all-linear"
    lora = LoraConfig(r=4, lora_alpha=12, target_modules=targets)
    pair = make_random_pair(tmp_path, architecture.model, config, lora, architecture.dtype)
    out = tmp_path / "out"
    touched = assert_merged_as_peft(pair, out, memory=10_000)
    if architecture.model.startswith("Mixtral") and not transformers.__version__.startswith("4."):
        pytest.skip("equal to PEFT; transformers 5 loads stacks of experts, whose names test_stored_names.py checks")

    adapted = {
        name.removeprefix("base_model.model.").replace(".lora_A", "")
        for name in load_file(pair.adapter / "adapter_model.safetensors")
        if ".lora_A" in name
    }
    assert touched == adapted
    assert {name.split(".")[-2] for name in adapted} == set(architecture.targets.split())
    before, after = (load_file(directory / "model.safetensors") for directory in (pair.base, out))
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))}
    assert same == before.keys() - adapted


HEADS = {
    "SEQ_CLS": ("BertForSequenceClassification", "BertConfig", BERT, "classifier"),
    "TOKEN_CLS": ("BertForTokenClassification", "BertConfig", BERT, "classifier"),
    "QUESTION_ANS": ("BertForQuestionAnswering", "BertConfig", BERT, "qa_outputs"),
    "SEQ_CLS of a decoder": ("LlamaForSequenceClassification", "LlamaConfig", LLAMA, "score"),
}


@pytest.mark.parametrize("case", HEADS)
def test_heads_that_peft_saves_of_its_own_accord(tmp_path: Path, case: str) -> None:
    """It writes every name that such a head may have into modules_to_save."""
    model, config, targets, head = HEADS[case]
    lora = LoraConfig(r=4, task_type=case.split()[0], target_modules=targets.split()[:2])
    base = getattr(transformers, config)(**WIDE, **TOKENS)
    pair = make_random_pair(tmp_path, model, base, lora, torch.float16)
    touched = assert_merged_as_peft(pair, tmp_path / "out")
    assert {name for name in touched if head in name} == {name for name in stored(pair.base) if head in name}
    assert {name.split(".")[-2] for name in touched} == {*targets.split()[:2], head}


def test_a_lora_on_a_tied_weight_of_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    """T5 scales what its head reads only while the embeddings are tied: two weights would be another model."""
    t5 = ARCHITECTURES["t5"]
    config = transformers.T5Config(**t5.sizes, **TOKENS)
    pair = make_random_pair(tmp_path, t5.model, config, LoraConfig(r=4, target_modules=["lm_head"]))
    with pytest.raises(InputRefused, match=r"lm_head.*tied to 'shared"):
        merge(pair, tmp_path / "out")
    assert not (tmp_path / "out").exists()
