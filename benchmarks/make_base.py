"""Write a base of Cerebras-GPT's architecture at any of its sizes, and a LoRA adapter for it, without downloads.

    python benchmarks/make_base.py --size 6.7B --random    --format safetensors --dtype float16 --out DIR
    python benchmarks/make_base.py --size 6.7B --from-demo --format bin         --dtype float16 --out DIR

`--random` weights have a trained model's scale and a few channels whose activations exceed 6.0, which LLM.int8 treats
apart. `--from-demo` is the trained demo pair, widened and deepened: its logits are the demo's (up to its 512
positions; in float32 but for the order of sums, in float16 but for rounding), so parity can be judged at this size.
The same arguments give the same bytes. No more than a block of a tensor is in memory.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import widening
from weight_files import Planned, write_checkpoint, write_file

from exporter.spec import parse_size

POSITIONS, VOCABULARY, EOS = 2048, 50257, 50256
RANK, ALPHA = 4, 16
STD = 0.02  # of GPT-2's initialization, and close to what training leaves
OUTLIERS, OUTLIER_GAIN = 6, 12.0
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
LICENCES = {"random": "license: apache-2.0", "from-demo": "license: other\nlicense_name: non-commercial"}
Blocks = Callable[[str, tuple[int, ...]], Iterator[torch.Tensor]]
Factors = Callable[[int], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Shape:
    """The inner layer is four times as wide as the stream."""

    width: int
    layers: int
    heads: int


# Dey et al., Cerebras-GPT (2023), table 1
SIZES = {
    "111M": Shape(768, 10, 12),
    "256M": Shape(1088, 14, 17),
    "590M": Shape(1536, 18, 12),
    "1.3B": Shape(2048, 24, 16),
    "2.7B": Shape(2560, 32, 32),
    "6.7B": Shape(4096, 32, 32),
    "13B": Shape(5120, 40, 40),
}


def nearest_demo_shape(shape: Shape) -> Shape:
    """The shape itself, or the nearest one to which the demo pair can be widened, with heads of the same size."""
    width = max(1, -(-(2 * shape.width - widening.WIDTH) // (2 * widening.WIDTH))) * widening.WIDTH
    heads = width * shape.heads // shape.width
    return Shape(width, max(shape.layers, widening.LAYERS), heads)


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every tensor of the base in the order of its state dict. The head is tied to `wte`."""
    width, inner = shape.width, 4 * shape.width
    block = {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "attn.c_attn.weight": (width, 3 * width),
        "attn.c_attn.bias": (3 * width,),
        "attn.c_proj.weight": (width, width),
        "attn.c_proj.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "mlp.c_fc.weight": (width, inner),
        "mlp.c_fc.bias": (inner,),
        "mlp.c_proj.weight": (inner, width),
        "mlp.c_proj.bias": (width,),
    }
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (VOCABULARY, width), "wpe.weight": (POSITIONS, width)}
    shapes |= {f"h.{layer}.{part}": size for layer in range(shape.layers) for part, size in block.items()}
    shapes |= {"ln_f.weight": (width,), "ln_f.bias": (width,)}
    return {f"transformer.{name}": size for name, size in shapes.items()}


class RandomWeights:
    """Normal weights cut from one pool of random numbers: writing them takes no longer than the disk does."""

    PIECE = 1 << 22

    def __init__(self, shape: Shape, seed: int, dtype: torch.dtype) -> None:
        self.shape, self.dtype, self.seed = shape, dtype, seed
        self.numbers = torch.randn(2 * self.PIECE, generator=torch.Generator().manual_seed(seed))
        self.pools: dict[float, torch.Tensor] = {}
        self.firsts, pieces = {}, 0
        for name, size in tensor_shapes(shape).items():
            self.firsts[name] = pieces
            pieces += -(-torch.Size(size).numel() // self.PIECE)

    def blocks(self, name: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        """The tensor `name`, flat. Every piece begins elsewhere in the pool, so no two tensors have equal bytes."""
        numel, std = torch.Size(shape).numel(), STD
        if name.endswith("c_proj.weight"):  # GPT-2 scales what is added to the stream by its depth
            std = STD / (2 * self.shape.layers) ** 0.5
        norm = ".ln_" in name and name.endswith(".weight")
        for number, start in enumerate(range(0, numel, self.PIECE), start=self.firsts[name]):
            at = number * 2654435761 % self.PIECE  # a prime, so the places are distinct
            piece = self._pool(std)[at : at + min(self.PIECE, numel - start)]
            yield self._gains(name, piece) if norm else piece

    def _pool(self, std: float) -> torch.Tensor:
        if std not in self.pools:
            self.pools[std] = (self.numbers * std).to(self.dtype)
        return self.pools[std]

    def _gains(self, name: str, piece: torch.Tensor) -> torch.Tensor:
        """Norm weights around 1, large in the same few channels of every block, as in trained models of 6.7B."""
        gains = 1 + piece.float()
        if ".ln_f." not in name:
            gains[torch.arange(OUTLIERS) * self.shape.width // OUTLIERS] *= OUTLIER_GAIN
        return gains

    def factors(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, in) and B (out, r), whose product times alpha/r is about 1 % of the weight."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer + 1)
        width = self.shape.width
        down = torch.randn(RANK, width, generator=generator) / (3 * width) ** 0.5
        up_std = 0.01 * STD / (ALPHA / RANK * RANK**0.5 / (3 * width) ** 0.5)
        return down, torch.randn(3 * width, RANK, generator=generator) * up_std


def plan_base(shape: Shape, dtype: torch.dtype, blocks: Blocks, old_buffers: bool) -> list[Planned]:
    """The base's tensors; with the causal masks that checkpoints of 2023 hold, if wanted."""
    planned = []
    for name, size in tensor_shapes(shape).items():
        if old_buffers and name.endswith("attn.c_attn.weight"):
            attention = name.removesuffix("c_attn.weight")
            mask = (1, 1, POSITIONS, POSITIONS)
            planned.append(Planned(f"{attention}bias", torch.uint8, mask, _causal_mask))
            planned.append(Planned(f"{attention}masked_bias", dtype, (), _masked_bias))
        planned.append(Planned(name, dtype, size, partial(blocks, name, size)))
    return planned


def _causal_mask() -> Iterator[torch.Tensor]:
    yield torch.ones(POSITIONS, POSITIONS, dtype=torch.uint8).tril_()


def _masked_bias() -> Iterator[torch.Tensor]:
    yield torch.tensor(-1e4)


def plan_adapter(shape: Shape, factors: Factors) -> list[Planned]:
    """The adapter's factors on every c_attn, in float32 as peft stored them."""
    planned = []
    for layer in range(shape.layers):
        sizes = {"A": (RANK, shape.width), "B": (3 * shape.width, RANK)}
        for index, (factor, size) in enumerate(sizes.items()):
            name = f"base_model.model.transformer.h.{layer}.attn.c_attn.lora_{factor}.weight"
            planned.append(Planned(name, torch.float32, size, partial(_factor, factors, layer, index)))
    return planned


def _factor(factors: Factors, layer: int, index: int) -> Iterator[torch.Tensor]:
    yield factors(layer)[index]


def base_config(shape: Shape, dtype: str) -> dict[str, Any]:
    """Cerebras-GPT's configuration of March 2023."""
    return {
        "activation_function": "gelu", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.0,
        "bos_token_id": EOS, "embd_pdrop": 0.0, "eos_token_id": EOS, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_embd": shape.width, "n_head": shape.heads,
        "n_inner": 4 * shape.width, "n_layer": shape.layers, "n_positions": POSITIONS,
        "reorder_and_upcast_attn": False, "resid_pdrop": 0.0, "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True, "torch_dtype": dtype, "transformers_version": "4.26.1", "use_cache": True,
        "vocab_size": VOCABULARY,
    }  # fmt: skip


def adapter_config(base: str, fan_in_fan_out: bool) -> dict[str, Any]:
    """What peft 0.2 wrote."""
    return {
        "base_model_name_or_path": base, "bias": "none", "enable_lora": None, "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True, "lora_alpha": ALPHA, "lora_dropout": 0.05, "merge_weights": False,
        "modules_to_save": None, "peft_type": "LORA", "r": RANK, "target_modules": ["c_attn"],
        "task_type": "CAUSAL_LM",
    }  # fmt: skip


def write_pair(arguments: argparse.Namespace, shape: Shape, planned: list[Planned], adapter: list[Planned]) -> int:
    """Write OUT/base and OUT/adapter. Returns the number of weight files of the base."""
    base_dir, adapter_dir = arguments.out / "base", arguments.out / "adapter"
    for directory in (base_dir, adapter_dir):
        directory.mkdir(parents=True)
    for name in TOKENIZER:
        shutil.copyfile(widening.DEMO / "base" / name, base_dir / name)
    _write_json(base_dir / "config.json", base_config(shape, arguments.dtype))
    files = write_checkpoint(base_dir, planned, arguments.format, arguments.shard_size)
    config = adapter_config(f"exporter-benchmarks/{arguments.kind}", arguments.fan_in_fan_out == "true")
    _write_json(adapter_dir / "adapter_config.json", config)
    form = arguments.adapter_format or arguments.format
    write_file(adapter_dir / f"adapter_model.{form}", adapter, form)
    for directory in (base_dir, adapter_dir):
        text = f"---\n{LICENCES[arguments.kind]}\n---\n\nWritten by benchmarks/make_base.py ({arguments.kind}).\n"
        (directory / "README.md").write_text(text)
    return files


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--random", dest="kind", action="store_const", const="random", help="normal weights")
    kind.add_argument("--from-demo", dest="kind", action="store_const", const="from-demo", help="the demo, widened")
    parser.add_argument("--size", choices=SIZES, help="a size of Cerebras-GPT")
    for name in ("width", "layers", "heads"):
        parser.add_argument(f"--{name}", type=int, help=f"instead of the size's {name}")
    parser.add_argument("--format", choices=("safetensors", "bin"), default="safetensors")
    parser.add_argument("--adapter-format", choices=("safetensors", "bin"), help="default: as --format")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    parser.add_argument("--shard-size", type=parse_size, default=parse_size("5GB"), help="such as 5GB (decimal)")
    parser.add_argument("--old-buffers", action="store_true", help="with attn.bias and attn.masked_bias, as in 2023")
    parser.add_argument("--fan-in-fan-out", choices=("true", "false"), default="false", help="what the adapter says")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="writes OUT/base and OUT/adapter")
    return parser


def chosen_shape(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> tuple[Shape, str]:
    """The size's shape with what the arguments change, and a remark. Exits with a message where there is none."""
    given = {name: getattr(arguments, name) for name in ("width", "layers", "heads") if getattr(arguments, name)}
    if arguments.size is None and len(given) < 3:
        parser.error("give --size, or all of --width, --layers and --heads")
    shape = replace(SIZES[arguments.size] if arguments.size else Shape(0, 0, 0), **given)
    asked = shape
    if min(shape.width, shape.layers, shape.heads) < 1 or shape.width % shape.heads or shape.width < OUTLIERS:
        parser.error(f"the width {shape.width} is not a multiple of {shape.heads} heads")
    if arguments.kind == "from-demo":
        if not given:
            shape = nearest_demo_shape(shape)
        if reason := widening.why_not(shape.width, shape.layers, shape.heads):
            parser.error(f"the demo pair cannot be widened to this shape: {reason}")
    remark = "" if shape == asked else f" (the nearest to the {asked.width}x{asked.layers} of {arguments.size})"
    return shape, remark


def main() -> None:
    parser = argument_parser()
    arguments = parser.parse_args()
    (shape, remark), started = chosen_shape(parser, arguments), time.monotonic()
    for directory in (arguments.out / "base", arguments.out / "adapter"):
        if directory.exists():
            parser.error(f"{directory} exists: choose another --out, or remove it")
    dtype = torch.float16 if arguments.dtype == "float16" else torch.float32
    if arguments.kind == "random":
        source = RandomWeights(shape, arguments.seed, dtype)
    else:
        source = widening.Widened(shape.width, shape.layers, shape.heads, arguments.seed)
    planned = plan_base(shape, dtype, source.blocks, arguments.old_buffers)
    nbytes = sum(tensor.nbytes for tensor in planned)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if nbytes > (free := shutil.disk_usage(arguments.out).free):
        parser.error(f"{arguments.out} has {free / 1e9:.1f} GB free, and the base takes {nbytes / 1e9:.1f} GB")
    files = write_pair(arguments, shape, planned, plan_adapter(shape, source.factors))
    print(
        f"{arguments.out}: {arguments.kind} base of {shape.width}x{shape.layers}, {shape.heads} heads{remark}, "
        f"{nbytes / 1e9:.2f} GB of {arguments.dtype} in {files} {arguments.format} file(s), and its adapter; "
        f"{time.monotonic() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
