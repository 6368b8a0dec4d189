"""Small bases and adapters for tests, written by transformers and PEFT themselves. Random factors are never zero."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel, PreTrainedTokenizerFast

EOS = "<|endoftext|>"
HELLO, LOW = 256, 257  # the words of fallback_tokenizer


@dataclass(frozen=True)
class Pair:
    base: Path
    adapter: Path


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """257 tokens: one for each byte, and the end of text."""
    alphabet = sorted(ByteLevel.alphabet())
    bpe = Tokenizer(BPE({token: i for i, token in enumerate([*alphabet, EOS])}, []))
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False)
    bpe.decoder = ByteLevelDecoder()
    bpe.add_special_tokens([EOS])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=EOS, eos_token=EOS, unk_token=EOS)


def fallback_tokenizer() -> Tokenizer:
    """Llama-2's and Mistral's way: words, and bytes for the rest; one that is no UTF-8 spoils all bytes in its row."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁Hello": HELLO, "lo": LOW}
    tokenizer = Tokenizer(BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def gpt2_config(**changes: Any) -> GPT2Config:
    values: dict[str, Any] = {
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "vocab_size": 257,
        "activation_function": "gelu",
        "bos_token_id": 256,
        "eos_token_id": 256,
    }
    return GPT2Config(**(values | changes))


def save_base(directory: Path, config: Any, dtype: torch.dtype = torch.float16, seed: int = 0) -> PreTrainedModel:
    """A random base with a tokenizer; biases and norms are random too, so that nothing is trivially zero."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "ln" in name or "norm" in name:
            parameter.data += torch.randn_like(parameter) * 0.1
    model = model.to(dtype)
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return model


def save_adapter(directory: Path, model: PreTrainedModel, lora: LoraConfig, seed: int = 1, scale: float = 0.05) -> None:
    torch.manual_seed(seed)
    peft_model = get_peft_model(model, lora)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) * scale
    peft_model.save_pretrained(str(directory), save_embedding_layers=False)
    config = json.loads((directory / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "test/base"
    (directory / "adapter_config.json").write_text(json.dumps(config))


def make_pair(
    directory: Path, config: Any = None, dtype: torch.dtype = torch.float16, lora: LoraConfig | None = None
) -> Pair:
    pair = Pair(directory / "base", directory / "adapter")
    model = save_base(pair.base, config or gpt2_config(), dtype)
    save_adapter(pair.adapter, model, lora or lora_config())
    return pair


def lora_config(**changes: Any) -> LoraConfig:
    values: dict[str, Any] = {"r": 4, "lora_alpha": 16, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    return LoraConfig(**(values | changes))


def peft_merge(pair: Pair) -> dict[str, torch.Tensor]:
    """PEFT's own merge in float32, rounded once to each tensor's stored type: the oracle of every merge test."""
    stored = AutoModelForCausalLM.from_pretrained(pair.base, dtype="auto").state_dict()
    model = AutoModelForCausalLM.from_pretrained(pair.base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, str(pair.adapter)).merge_and_unload().state_dict()
    return {name: merged[name].to(stored[name].dtype) for name in stored}


def loaded(directory: Path) -> dict[str, torch.Tensor]:
    """What transformers loads, in the stored types. A key that is missing or unexpected is an error."""
    both: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True)
    model, report = both
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.state_dict()


def rewrite(path: Path, change: Any) -> None:
    """Apply `change` to the tensors of a safetensors file."""
    tensors = load_file(path)
    changed = change(dict(tensors))
    save_file({name: tensor.contiguous() for name, tensor in changed.items()}, path, metadata={"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text())
    values |= changes
    path.write_text(json.dumps(values))


def as_bin(directory: Path, *, shards: int = 1, old_buffers: bool = False) -> None:
    """Turn a safetensors directory into the 2023 layout: pytorch_model*.bin, with the buffers of old checkpoints."""
    tensors = load_file(directory / "model.safetensors")
    if old_buffers:
        for name in [name for name in tensors if name.endswith("attn.c_attn.weight")]:
            attention = name.removesuffix(".c_attn.weight")
            tensors[f"{attention}.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8).tril()
            tensors[f"{attention}.masked_bias"] = torch.tensor(-1e4, dtype=torch.float16)
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    (directory / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, directory / "pytorch_model.bin")
        return
    names = sorted(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        part = {name: tensors[name] for name in names[number::shards]}
        torch.save(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
