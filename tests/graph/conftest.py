"""Tiny random GPT-2 checkpoints, as transformers saves them, and transformers' own answers for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, PreTrainedTokenizerFast

torch.set_num_threads(1)

VOCABULARY = 257  # every byte, and the end
END = 256


@dataclass(frozen=True, slots=True)
class TinyModel:
    """A checkpoint directory and the transformers model that was saved there."""

    directory: Path
    model: Any  # a PreTrainedModel of any architecture

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """transformers' float32 logits (T, V)."""
        with torch.no_grad():
            return self.model(torch.tensor([list(token_ids)])).logits[0].numpy()

    def greedy(self, token_ids: Sequence[int], count: int) -> tuple[list[int], list[float]]:
        """transformers' greedy tokens, and at each the margin between its two best logits."""
        ids, margins = list(token_ids), []
        for _ in range(count):
            best, second = np.sort(self.logits(ids)[-1])[::-1][:2]
            margins.append(float(best - second))
            ids.append(int(self.logits(ids)[-1].argmax()))
        return ids[len(token_ids) :], margins


def llama_config(**options: Any) -> LlamaConfig:
    """Of a tiny Llama."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "bos_token_id": END,
        "eos_token_id": END,
    }
    return LlamaConfig(**(settings | options))


def tiny_model(directory: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> TinyModel:
    """Every parameter is random and far from its initial value: a wrong wire cannot hide behind a zero or a one."""
    settings: dict[str, Any] = {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": VOCABULARY,
        "n_positions": 32,
        "activation_function": "gelu",
        "bos_token_id": END,
        "eos_token_id": END,
    }
    torch.manual_seed(seed)
    # eager: transformers' sdpa path ignores scale_attn_weights and scale_attn_by_inverse_layer_idx
    config = GPT2Config(**(settings | options), attn_implementation="eager")
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.1 * noise if "ln_" in name and name.endswith("weight") else 0.2 * noise)
            if name.endswith("c_attn.weight") and not config.scale_attn_weights:
                # A model without the scale has learned q of its size. Scores sqrt(head size) as large would measure
                # the softmax's condition: float32 itself, transformers' too, is then 1e-4 from float64.
                parameter[:, : config.n_embd] *= (config.n_embd // config.n_head) ** -0.5
    torch.nn.Module.to(model, dtype)
    model.save_pretrained(directory)
    return TinyModel(directory, model.float())


def save_byte_tokenizer(directory: Path) -> None:
    """GPT-2's pre-tokenizer without merges: a token per byte, so any text can be encoded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)} | {"<|endoftext|>": END}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>"
    )
    fast.save_pretrained(directory)


def tokens(count: int, seed: int = 0, vocabulary: int = VOCABULARY - 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocabulary, count).tolist()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """float16 weights with a tokenizer, not yet exported."""
    directory = tmp_path_factory.mktemp("tiny") / "merged"
    tiny = tiny_model(directory, torch.float16)
    save_byte_tokenizer(directory)
    return tiny
