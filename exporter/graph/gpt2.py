"""GPT-2 (and Cerebras-GPT) as an ONNX graph that reads like transformers' modeling_gpt2.py.

Conv1D stores its weights as (in, out), which is what MatMul wants, and c_attn as q|k|v, which is what
GroupQueryAttention wants packed: so every initializer is the checkpoint's own tensor, byte for byte.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import onnx_ir as ir

from exporter.errors import InputRefused
from exporter.graph.components import Components, Inputs, KeyValue
from exporter.graph.config_values import activation, count, flag, number, refuse_other_models, require_head_size
from exporter.graph.decoder import Architecture, Decoder, Parameter, Sizes

# transformers' GPT2Config.attribute_map: either spelling may stand in config.json
ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
# Causal masks that old checkpoints carry as buffers: constants of the code, not parameters.
BUFFERS = (".attn.bias", ".attn.masked_bias")


@dataclass(frozen=True, slots=True)
class Gpt2Config:
    """What of transformers' GPT2Config changes the computation, under its names; `n_inner` resolved."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int
    activation: str  # a value of ACTIVATIONS
    layer_norm_epsilon: float
    scale_attn_weights: bool
    scale_attn_by_inverse_layer_idx: bool
    reorder_and_upcast_attn: bool
    tied: bool

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    def attention_scale(self, layer: int) -> float:
        """What q.k is multiplied by before the softmax (transformers' GPT2Attention)."""
        scale = self.head_size**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale


def read_gpt2(config: Mapping[str, Any]) -> Decoder:
    """Types of the JSON values are checked; InputRefused names the option that cannot be honoured."""
    parsed = _read_config(config)
    sizes = Sizes(
        vocab_size=parsed.vocab_size,
        n_positions=parsed.n_positions,
        hidden_size=parsed.n_embd,
        n_layer=parsed.n_layer,
        n_head=parsed.n_head,
        head_size=parsed.head_size,
    )
    return Decoder(
        model_class="GPT2LMHeadModel",
        sizes=sizes,
        prefix="transformer.",
        parameters=_parameters(parsed),
        head="lm_head",
        tied=parsed.tied,
        build=partial(_build, parsed),
        ignored=BUFFERS,
    )


GPT2 = Architecture("gpt2", "GPT-2, Cerebras-GPT", default_stop=50256, read=read_gpt2)


def _read_config(config: Mapping[str, Any]) -> Gpt2Config:
    values = {ALIASES.get(key, key): value for key, value in config.items()}
    refuse_other_models(values)
    n_embd = count(values, "n_embd", 768)
    parsed = Gpt2Config(
        vocab_size=count(values, "vocab_size", 50257),
        n_positions=count(values, "n_positions", 1024),
        n_embd=n_embd,
        n_layer=count(values, "n_layer", 12),
        n_head=count(values, "n_head", 12),
        n_inner=4 * n_embd if values.get("n_inner") is None else count(values, "n_inner", 0),
        activation=activation(values, "activation_function", "gelu_new"),
        layer_norm_epsilon=number(values, "layer_norm_epsilon", 1e-5),
        scale_attn_weights=flag(values, "scale_attn_weights", True),
        scale_attn_by_inverse_layer_idx=flag(values, "scale_attn_by_inverse_layer_idx", False),
        reorder_and_upcast_attn=flag(values, "reorder_and_upcast_attn", False),
        tied=flag(values, "tie_word_embeddings", True),
    )
    require_head_size("n_embd", parsed.n_embd, "n_head", parsed.n_head)
    return parsed


def _parameters(config: Gpt2Config) -> dict[str, Parameter]:
    e, inner = config.n_embd, config.n_inner
    parameters = {
        "wte.weight": Parameter("tokens", (config.vocab_size, e)),
        "wpe.weight": Parameter("positions", (config.n_positions, e)),
    }
    for i in range(config.n_layer):
        block = {
            "ln_1.weight": Parameter("vector", (e,)),
            "ln_1.bias": Parameter("vector", (e,)),
            "attn.c_attn.weight": Parameter("conv1d", (e, 3 * e)),
            "attn.c_attn.bias": Parameter("vector", (3 * e,)),
            "attn.c_proj.weight": Parameter("conv1d", (e, e)),
            "attn.c_proj.bias": Parameter("vector", (e,)),
            "ln_2.weight": Parameter("vector", (e,)),
            "ln_2.bias": Parameter("vector", (e,)),
            "mlp.c_fc.weight": Parameter("conv1d", (e, inner)),
            "mlp.c_fc.bias": Parameter("vector", (inner,)),
            "mlp.c_proj.weight": Parameter("conv1d", (inner, e)),
            "mlp.c_proj.bias": Parameter("vector", (e,)),
        }
        parameters |= {f"h.{i}.{name}": parameter for name, parameter in block.items()}
    parameters |= {"ln_f.weight": Parameter("vector", (e,)), "ln_f.bias": Parameter("vector", (e,))}
    if not config.tied:
        parameters["lm_head.weight"] = Parameter("head", (config.vocab_size, e))
    return parameters


def _build(config: Gpt2Config, c: Components) -> ir.Graph:
    """Inputs input_ids, attention_mask, position_ids (int64) and the cache; outputs logits (float32), cache."""
    if c.target == "cuda" and config.reorder_and_upcast_attn:
        raise InputRefused(
            "config.json sets reorder_and_upcast_attn, which float16 attention does not honour",
            expected="attention in float32",
            todo="export with --target cpu",
        )
    given = c.inputs(config.n_layer, config.n_head, config.head_size)
    epsilon = config.layer_norm_epsilon
    hidden = c.embed("wte.weight", given.input_ids)
    residual, pending_bias = c.embed("wpe.weight", given.position_ids), None
    present: list[ir.Value] = []
    for i in range(config.n_layer):
        normed, residual = c.add_norm(f"h.{i}.ln_1", hidden, residual, pending_bias, epsilon)
        hidden, cache = _attention(config, c, i, normed, given)
        normed, residual = c.add_norm(f"h.{i}.ln_2", hidden, residual, f"h.{i}.attn.c_proj.bias", epsilon)
        hidden, pending_bias = _mlp(config, c, i, normed), f"h.{i}.mlp.c_proj.bias"
        present += cache
    normed, _ = c.add_norm("ln_f", hidden, residual, pending_bias, epsilon)
    weight_of = "wte" if config.tied else "lm_head"
    return c.finish(given, normed, present, head="lm_head", weight_of=weight_of, vocab_size=config.vocab_size)


def _attention(config: Gpt2Config, c: Components, i: int, x: ir.Value, given: Inputs) -> tuple[ir.Value, KeyValue]:
    name = f"h.{i}.attn"
    product = c.conv1d(f"{name}.c_attn", x)
    qkv = c.add(f"{name}.qkv", product, c.parameter(f"{name}.c_attn.bias"))  # (B, S, 3 E)
    context, cache = c.attention(name, i, (qkv, None, None), given, config.attention_scale(i))
    return c.conv1d(f"{name}.c_proj", context), cache


def _mlp(config: Gpt2Config, c: Components, i: int, x: ir.Value) -> ir.Value:
    name = f"h.{i}.mlp"
    bias = c.parameter(f"{name}.c_fc.bias")
    return c.conv1d(f"{name}.c_proj", c.activate(f"{name}.act", config.activation, c.conv1d(f"{name}.c_fc", x), bias))
