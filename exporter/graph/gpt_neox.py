"""GPT-NeoX (and Pythia) as an ONNX graph that reads like transformers' modeling_gpt_neox.py.

nn.Linear stores its weights as (out, in): FusedMatMul and MatMulNBits take them so. query_key_value interleaves heads,
(heads, q|k|v, head size) along its outputs: its product is split, never its weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import onnx_ir as ir

from exporter.errors import InputRefused
from exporter.graph.builder import MICROSOFT
from exporter.graph.components import INT64, Components, Inputs, KeyValue
from exporter.graph.config_values import activation, count, flag, number, refuse_other_models, require_head_size
from exporter.graph.decoder import Architecture, Decoder, Parameter, Sizes

# Buffers of old checkpoints: constants of the code, not parameters.
BUFFERS = (".attention.bias", ".attention.masked_bias", ".attention.rotary_emb.inv_freq", ".rotary_emb.inv_freq")
ROPE_TYPES = ("default", "linear")


@dataclass(frozen=True, slots=True)
class GptNeoxConfig:
    """What of transformers' GPTNeoXConfig changes the computation, under its names."""

    vocab_size: int
    max_position_embeddings: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    activation: str  # a value of ACTIVATIONS
    layer_norm_eps: float
    use_parallel_residual: bool
    attention_bias: bool
    rotary_size: int  # the first elements of a head, which are rotated
    rope_theta: float
    rope_factor: float  # positions are divided by it
    tied: bool

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads


def read_gpt_neox(config: Mapping[str, Any]) -> Decoder:
    """Types of the JSON values are checked; InputRefused names the option that cannot be honoured."""
    parsed = _read_config(config)
    sizes = Sizes(
        vocab_size=parsed.vocab_size,
        n_positions=parsed.max_position_embeddings,
        hidden_size=parsed.hidden_size,
        n_layer=parsed.num_hidden_layers,
        n_head=parsed.num_attention_heads,
        head_size=parsed.head_size,
    )
    return Decoder(
        model_class="GPTNeoXForCausalLM",
        sizes=sizes,
        prefix="gpt_neox.",
        parameters=_parameters(parsed),
        head="embed_out",
        tied=parsed.tied,
        build=partial(_build, parsed),
        renamed={"lm_head": "embed_out", "lm_head.weight": "embed_out.weight"},  # transformers 5
        ignored=BUFFERS,
    )


GPT_NEOX = Architecture("gpt_neox", "GPT-NeoX, Pythia", default_stop=2, read=read_gpt_neox)


def _read_config(values: Mapping[str, Any]) -> GptNeoxConfig:
    refuse_other_models(values)
    hidden_size = count(values, "hidden_size", 6144)
    heads = count(values, "num_attention_heads", 64)
    require_head_size("hidden_size", hidden_size, "num_attention_heads", heads)
    if values.get("head_dim") not in (None, hidden_size // heads):
        raise InputRefused(
            f"config.json has head_dim {values['head_dim']!r}", expected=f"{hidden_size // heads}, or no such key"
        )
    rope = _rope(values)
    share = _positive(rope, "partial_rotary_factor", 1.0)
    rotary_size = int(hidden_size // heads * share)
    if share > 1 or rotary_size < 2 or rotary_size % 2:
        raise InputRefused(
            f"config.json rotates {share:g} of a head of {hidden_size // heads} elements (rotary_pct)",
            expected="an even number of elements, at least two",
            todo="export with --builder optimum",
        )
    return GptNeoxConfig(
        vocab_size=count(values, "vocab_size", 50432),
        max_position_embeddings=count(values, "max_position_embeddings", 2048),
        hidden_size=hidden_size,
        num_hidden_layers=count(values, "num_hidden_layers", 44),
        num_attention_heads=heads,
        intermediate_size=count(values, "intermediate_size", 24576),
        activation=activation(values, "hidden_act", "gelu"),
        layer_norm_eps=number(values, "layer_norm_eps", 1e-5),
        use_parallel_residual=flag(values, "use_parallel_residual", True),
        attention_bias=flag(values, "attention_bias", True),
        rotary_size=rotary_size,
        rope_theta=_positive(rope, "rope_theta", 10000.0),
        rope_factor=_positive(rope, "factor", 1.0) if rope["rope_type"] == "linear" else 1.0,
        tied=flag(values, "tie_word_embeddings", False),
    )


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 5's rope_parameters, from either version's spelling: what both make of it, in their order."""
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise InputRefused(f"config.json: rope_scaling is {given!r}", expected="an object")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise InputRefused(
            f"config.json asks for rotary positions of type {kind!r} (rope_type)",
            expected="one of " + ", ".join(ROPE_TYPES),
            todo="export with --builder optimum",
        )
    older = {
        "rope_theta": values.get("rotary_emb_base", 10000.0),
        "partial_rotary_factor": values.get("rotary_pct", 0.25),
    }
    return older | given | {"rope_type": kind}


def _positive(values: Mapping[str, Any], key: str, default: float) -> float:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise InputRefused(f"config.json: {key} is {value!r}", expected="a positive number")
    return float(value)


def _parameters(config: GptNeoxConfig) -> dict[str, Parameter]:
    e, inner = config.hidden_size, config.intermediate_size
    parameters = {"embed_in.weight": Parameter("tokens", (config.vocab_size, e))}
    for i in range(config.num_hidden_layers):
        block = {
            "input_layernorm.weight": Parameter("vector", (e,)),
            "input_layernorm.bias": Parameter("vector", (e,)),
            "post_attention_layernorm.weight": Parameter("vector", (e,)),
            "post_attention_layernorm.bias": Parameter("vector", (e,)),
            "attention.query_key_value.weight": Parameter("linear", (3 * e, e)),
            "attention.dense.weight": Parameter("linear", (e, e)),
            "mlp.dense_h_to_4h.weight": Parameter("linear", (inner, e)),
            "mlp.dense_h_to_4h.bias": Parameter("vector", (inner,)),
            "mlp.dense_4h_to_h.weight": Parameter("linear", (e, inner)),
            "mlp.dense_4h_to_h.bias": Parameter("vector", (e,)),
        }
        if config.attention_bias:
            block["attention.query_key_value.bias"] = Parameter("vector", (3 * e,))
            block["attention.dense.bias"] = Parameter("vector", (e,))
        parameters |= {f"layers.{i}.{name}": parameter for name, parameter in block.items()}
    parameters["final_layer_norm.weight"] = Parameter("vector", (e,))
    parameters["final_layer_norm.bias"] = Parameter("vector", (e,))
    if not config.tied:
        parameters["embed_out.weight"] = Parameter("head", (config.vocab_size, e))
    return parameters


def _build(config: GptNeoxConfig, c: Components) -> ir.Graph:
    """Inputs input_ids, attention_mask, position_ids (int64) and the cache; outputs logits (float32), cache."""
    given = c.inputs(config.num_hidden_layers, config.num_attention_heads, config.head_size)
    tables = _rotary_tables(config, c)
    epsilon = config.layer_norm_eps
    residual = c.embed("embed_in.weight", given.input_ids)
    pending: tuple[ir.Value, str] | None = None  # what the residual still lacks, and its bias
    present: list[ir.Value] = []
    for i in range(config.num_hidden_layers):
        layer = f"layers.{i}"
        first, second = f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"
        if pending is None:
            normed = c.norm(first, residual, epsilon)
        else:
            normed, residual = c.add_norm(first, pending[0], residual, pending[1], epsilon)
        attended, cache = _attention(config, c, i, normed, given, tables)
        bias = f"{layer}.attention.dense.bias" if config.attention_bias else None
        if config.use_parallel_residual:  # x + attention(norm(x)) + mlp(norm(x)): both norms are of x
            if bias is not None:
                attended = c.add(f"{layer}.attended", attended, c.parameter(bias))
            fed = _mlp(config, c, i, c.norm(second, residual, epsilon))
            hidden = c.add(f"{layer}.both", attended, fed)
        else:
            normed, residual = c.add_norm(second, attended, residual, bias, epsilon)
            hidden = _mlp(config, c, i, normed)
        pending = hidden, f"{layer}.mlp.dense_4h_to_h.bias"
        present += cache
    assert pending is not None
    normed, _ = c.add_norm("final_layer_norm", pending[0], residual, pending[1], epsilon)
    weight_of = "embed_in" if config.tied else "embed_out"
    return c.finish(given, normed, present, head="embed_out", weight_of=weight_of, vocab_size=config.vocab_size)


def _rotary_tables(config: GptNeoxConfig, c: Components) -> tuple[ir.Value, ir.Value]:
    """cos and sin (n_positions, rotary size / 2), in float32 as transformers' GPTNeoXRotaryEmbedding takes them."""
    import torch  # its powers and cosines, which numpy rounds otherwise; a graph without rotary tables goes without it

    steps = torch.arange(0, config.rotary_size, 2, dtype=torch.int64).float() / config.rotary_size
    frequencies = 1.0 / config.rope_theta**steps / config.rope_factor
    angles = torch.outer(torch.arange(config.max_position_embeddings).float(), frequencies)
    cos = c.b.table(angles.cos().numpy(), c.dtype, "rotary.cos")
    return cos, c.b.table(angles.sin().numpy(), c.dtype, "rotary.sin")


def _attention(
    config: GptNeoxConfig, c: Components, i: int, x: ir.Value, given: Inputs, tables: tuple[ir.Value, ir.Value]
) -> tuple[ir.Value, KeyValue]:
    name, b = f"layers.{i}.attention", c.b
    product = c.linear(f"{name}.query_key_value", x)
    if config.attention_bias:
        product = c.add(f"{name}.biased", product, c.parameter(f"{name}.query_key_value.bias"))  # (B, S, 3 E)
    by_head = b.constant([0, 0, config.num_attention_heads, 3 * config.head_size], INT64, "by_head")
    flat = b.constant([0, 0, config.hidden_size], INT64, "flat")
    (heads,) = b.op("Reshape", [product, by_head], name=f"{name}.heads")  # (B, S, H, 3 D)
    parts = b.op("Split", [heads], {"axis": -1, "num_outputs": 3}, name=f"{name}.parts", outputs=3)
    q, k, v = (b.op("Reshape", [part, flat], name=f"{part.name}.flat")[0] for part in parts)  # (B, S, E)
    attributes = {"num_heads": config.num_attention_heads, "rotary_embedding_dim": config.rotary_size}
    if config.rotary_size == config.head_size:
        attributes["rotary_embedding_dim"] = 0  # the operator's word for all of a head
    positions = [given.position_ids, *tables]
    (q,) = b.op("RotaryEmbedding", [q, *positions], attributes, domain=MICROSOFT, name=f"{name}.q")
    (k,) = b.op("RotaryEmbedding", [k, *positions], attributes, domain=MICROSOFT, name=f"{name}.k")
    context, cache = c.attention(name, i, (q, k, v), given, config.head_size**-0.5)
    return c.linear(f"{name}.dense", context), cache


def _mlp(config: GptNeoxConfig, c: Components, i: int, x: ir.Value) -> ir.Value:
    name = f"layers.{i}.mlp"
    bias = c.parameter(f"{name}.dense_h_to_4h.bias")
    inner = c.activate(f"{name}.act", config.activation, c.linear(f"{name}.dense_h_to_4h", x), bias)
    return c.linear(f"{name}.dense_4h_to_h", inner)
