"""A GPT-2 checkpoint (safetensors) as GGUF in float32, or quantized by llama.cpp's own function.

    python benchmarks/to_gguf.py CHECKPOINT OUT.gguf [--quantize q8_0|q4_0|q4_k_m|f16 --threads 2]

Runs in the peers' environment: gguf, numpy, and llama_cpp for --quantize (then CHECKPOINT is a GGUF file). A tensor at
a time is in memory. llama.cpp computes GPT-2 with the tanh approximation of gelu, whatever the configuration says: for
a model whose `activation_function` is `gelu` (Cerebras-GPT) its logits differ a little, in every precision.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import gguf  # pyright: ignore[reportMissingImports] (in the peers' environment)
import numpy as np

NAMES = {
    "wte.weight": "token_embd.weight",
    "wpe.weight": "position_embd.weight",
    "ln_f": "output_norm",
    "lm_head.weight": "output.weight",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
KINDS = ("f16", "q8_0", "q4_0", "q4_k_s", "q4_k_m")
BUFFERS = (".attn.bias", ".attn.masked_bias")
DTYPES = {"F32": np.float32, "F16": np.float16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--quantize", choices=KINDS)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    partial = options.out.with_suffix(".partial")
    if options.quantize:
        quantize(options.source, partial, options.quantize, options.threads)
    else:
        convert(options.source, partial)
    partial.rename(options.out)


def convert(checkpoint: Path, out: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    if config["model_type"] != "gpt2" or config.get("scale_attn_by_inverse_layer_idx"):
        raise SystemExit(f"{checkpoint}: llama.cpp's gpt2 does not compute this configuration")
    writer = gguf.GGUFWriter(out, "gpt2")
    writer.add_name(checkpoint.name)
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    add_tokenizer(writer, checkpoint, config)
    tensors = dict(read_tensors(checkpoint))
    for name, tensor in tensors.items():
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), 4 * tensor.size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors.values():
        writer.write_tensor_data(np.ascontiguousarray(tensor, np.float32))
    writer.close()


def read_tensors(checkpoint: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names of GGUF and views of the mapped files; Conv1D's matrices are transposed, for GGUF's are (out, in)."""
    for file in sorted(checkpoint.glob("*.safetensors")):
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
        data = np.memmap(file, np.uint8, "r", 8 + length)
        for name, info in header.items():
            if name == "__metadata__" or name.endswith(BUFFERS):
                continue
            begin, end = info["data_offsets"]
            tensor = data[begin:end].view(DTYPES[info["dtype"]]).reshape(info["shape"])
            short = name.removeprefix("transformer.")
            matrix = short.startswith("h.") and len(info["shape"]) == 2
            yield gguf_name(short), tensor.T if matrix else tensor


def gguf_name(name: str) -> str:
    """h.3.mlp.c_fc.bias is blk.3.ffn_up.bias."""
    if name in NAMES:
        return NAMES[name]
    module, kind = name.rsplit(".", 1)
    if not module.startswith("h."):
        return f"{NAMES[module]}.{kind}"
    _, layer, part = module.split(".", 2)
    return f"blk.{layer}.{NAMES[part]}.{kind}"


def add_tokenizer(writer: gguf.GGUFWriter, checkpoint: Path, config: dict) -> None:
    content = json.loads((checkpoint / "tokenizer.json").read_text())
    words: dict[str, int] = content["model"]["vocab"]
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    by_id = {number: word for word, number in (words | added).items()}
    kinds = gguf.TokenType
    tokens, types = [], []
    for number in range(config["vocab_size"]):
        word = by_id.get(number)
        tokens.append(f"[PAD{number}]" if word is None else word)
        types.append(kinds.UNUSED if word is None else kinds.CONTROL if word in added else kinds.NORMAL)
    merges = content["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])


def quantize(source: Path, out: Path, kind: str, threads: int) -> None:
    """As llama-quantize does: a tied embedding, which is the head too, is kept better than the rest."""
    import llama_cpp  # pyright: ignore[reportMissingImports]

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}"), threads
    if code := llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), options):
        raise SystemExit(f"llama.cpp's quantization of {source} gave {code}")


if __name__ == "__main__":
    main()
