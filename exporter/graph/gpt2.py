"""GPT-2 (and Cerebras-GPT) as an ONNX graph that reads like transformers' modeling_gpt2.py.

Conv1D stores its weights as (in, out), which is what MatMul wants, and c_attn as q|k|v, which is what
GroupQueryAttention wants packed: so every initializer is the checkpoint's own tensor, byte for byte.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from exporter.errors import InputRefused
from exporter.graph.attention_inputs import AttentionInputs, biased_attention_inputs, packed_attention_inputs
from exporter.graph.builder import DTYPES, MICROSOFT, GraphBuilder
from exporter.graph.gpt2_config import Gpt2Config
from exporter.graph.low_rank import add_fixed_low_rank, add_low_rank
from exporter.graph.weights import Quantized, Weight

PREFIX = "transformer."
# Causal masks that old checkpoints carry as buffers: constants of the code, not parameters.
BUFFERS = (".attn.bias", ".attn.masked_bias")
# An optional input, int64 (1,): for how many of the last positions logits are computed; all of them by default.
LOGITS_TO_KEEP = "logits_to_keep"
EVERYTHING = (1 << 63) - 1
INT64, FLOAT, FLOAT16 = ir.DataType.INT64, ir.DataType.FLOAT, ir.DataType.FLOAT16


@dataclass(frozen=True, slots=True)
class Gpt2Graph:
    """`target` cpu: float32 activations and cache, exact padding anywhere. cuda: float16, right padding only."""

    config: Gpt2Config
    weights: Mapping[str, Weight]  # names without the `transformer.` prefix
    target: str
    accuracy_level: int  # of MatMulNBits: 4 = int8 activations
    adapted: frozenset[str] = frozenset()  # modules whose LoRA factors are inputs, such as h.0.attn.c_attn

    def build(self, metadata: dict[str, str]) -> ir.Model:
        """Inputs input_ids, attention_mask, position_ids (int64) and the cache; outputs logits (float32), cache."""
        b, config = GraphBuilder(), self.config
        input_ids = b.input("input_ids", INT64, ["batch", "sequence"])
        mask = b.input("attention_mask", INT64, ["batch", "total_sequence"])
        position_ids = b.input("position_ids", INT64, ["batch", "sequence"])
        cache_shape = ["batch", config.n_head, "past_sequence", config.head_size]
        past = [
            (
                b.input(f"past_key_values.{i}.key", self.dtype, cache_shape),
                b.input(f"past_key_values.{i}.value", self.dtype, cache_shape),
            )
            for i in range(config.n_layer)
        ]
        lengths = (biased_attention_inputs if self.target == "cpu" else packed_attention_inputs)(b, input_ids, mask)

        hidden = self._embed(b, "wte.weight", input_ids)
        residual, pending_bias = self._embed(b, "wpe.weight", position_ids), None
        present: list[ir.Value] = []
        for i in range(config.n_layer):
            normed, residual = self._add_norm(b, f"h.{i}.ln_1", hidden, residual, pending_bias)
            hidden, key, value = self._attention(b, i, normed, past[i], lengths)
            normed, residual = self._add_norm(b, f"h.{i}.ln_2", hidden, residual, f"h.{i}.attn.c_proj.bias")
            hidden, pending_bias = self._mlp(b, i, normed), f"h.{i}.mlp.c_proj.bias"
            present += [key, value]
        keep = b.optional_input(LOGITS_TO_KEEP, INT64, [EVERYTHING])
        normed, _ = self._add_norm(b, "ln_f", hidden, residual, pending_bias)
        logits = self._head(b, self._last_positions(b, normed, keep))
        inputs = [input_ids, mask, position_ids, *(value for pair in past for value in pair), keep]
        return b.build(inputs, [logits, *present], metadata)

    @property
    def dtype(self) -> ir.DataType:
        """Of activations and cache."""
        return FLOAT if self.target == "cpu" else FLOAT16

    def _parameter(self, b: GraphBuilder, name: str) -> ir.Value:
        weight = self.weights[name]
        assert not isinstance(weight, Quantized), name
        return b.cast(b.weight(weight), self.dtype)

    def _embed(self, b: GraphBuilder, name: str, ids: ir.Value) -> ir.Value:
        weight = self.weights[name]
        if isinstance(weight, Quantized):
            return self._embed_quantized(b, weight, ids)
        # (B, S, E): the rows are cast, not the table
        (rows,) = b.op("Gather", [b.weight(weight), ids], name=f"{name}.rows")
        rows.dtype = DTYPES[weight.dtype]
        return b.cast(rows, self.dtype)

    def _embed_quantized(self, b: GraphBuilder, weight: Quantized, ids: ir.Value) -> ir.Value:
        # The head reads the same bytes as (N, K / block, bytes); this view of them is 2-D.
        flat = (weight.rows, weight.codes.shape[1] * weight.codes.shape[2])
        codes = b.weight(weight.codes, name=f"{weight.codes.name}.flat", shape=flat)
        # A name of their own: the head's scales are the same bytes, and each is cast by a node of its own.
        scales = b.cast(b.weight(weight.scales, name=f"{weight.scales.name}.flat"), FLOAT)
        attributes = {"bits": weight.bits, "block_size": weight.block, "gather_axis": 0, "quantize_axis": 1}
        (rows,) = b.op(
            "GatherBlockQuantized", [codes, ids, scales], attributes, domain=MICROSOFT, name=f"{weight.name}.rows"
        )
        if weight.columns % weight.block:  # the last block is filled up
            start, axis = b.constant([0], INT64, "zero_1d"), b.constant([2], INT64, "two_1d")
            end = b.constant([weight.columns], INT64, f"{weight.name}.columns")
            (rows,) = b.op("Slice", [rows, start, end, axis], name=f"{weight.name}.own")
        rows.dtype = FLOAT
        return b.cast(rows, self.dtype)

    def _add_norm(
        self, b: GraphBuilder, name: str, hidden: ir.Value, residual: ir.Value, bias: str | None
    ) -> tuple[ir.Value, ir.Value]:
        """The residual sum hidden + residual + bias, and its layer norm."""
        inputs = [hidden, residual, self._parameter(b, f"{name}.weight"), self._parameter(b, f"{name}.bias")]
        if bias is not None:
            inputs.append(self._parameter(b, bias))
        normed, _, _, total = b.op(
            "SkipLayerNormalization",
            inputs,
            {"epsilon": self.config.layer_norm_epsilon},
            domain=MICROSOFT,
            name=name,
            outputs=4,
        )
        return normed, total

    def _linear(self, b: GraphBuilder, name: str, x: ir.Value, suffix: str = "") -> ir.Value:
        """x W, without the bias: the next node takes it in."""
        weight = self.weights[f"{name}.weight"]
        if isinstance(weight, Quantized):
            y = self._linear_quantized(b, weight, x, self.dtype)
        else:
            (y,) = b.op("MatMul", [x, self._parameter(b, f"{name}.weight")], name=f"{name}{suffix}")
        return add_low_rank(b, name, x, y, weight.shape, self.dtype) if name in self.adapted else y

    def _linear_quantized(self, b: GraphBuilder, weight: Quantized, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        inputs = [x, b.weight(weight.codes), b.cast(b.weight(weight.scales), dtype)]
        attributes = {"K": weight.columns, "N": weight.rows, "bits": weight.bits, "block_size": weight.block}
        if self.accuracy_level:
            attributes["accuracy_level"] = self.accuracy_level
        (y,) = b.op("MatMulNBits", inputs, attributes, domain=MICROSOFT, name=f"{weight.name}.product")
        if weight.down is None or weight.up is None:
            return y
        return add_fixed_low_rank(b, weight.name, x, y, b.weight(weight.down), b.weight(weight.up), dtype)

    def _attention(
        self, b: GraphBuilder, i: int, x: ir.Value, past: tuple[ir.Value, ir.Value], lengths: AttentionInputs
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        config, name = self.config, f"h.{i}.attn"
        product = self._linear(b, f"{name}.c_attn", x)
        (qkv,) = b.op("Add", [product, self._parameter(b, f"{name}.c_attn.bias")], name=f"{name}.qkv")  # (B, S, 3 E)
        inputs = [qkv, None, None, *past, lengths.seqlens_k, lengths.total]
        if lengths.bias is not None:
            inputs += [None, None, None, lengths.bias]
        attributes = {"num_heads": config.n_head, "kv_num_heads": config.n_head, "scale": config.attention_scale(i)}
        context, key, value = b.op("GroupQueryAttention", inputs, attributes, domain=MICROSOFT, name=name, outputs=3)
        for kind, present in (("key", key), ("value", value)):
            present.name, present.dtype = f"present.{i}.{kind}", self.dtype
            present.shape = ir.Shape(["batch", config.n_head, "present_sequence", config.head_size])
        return self._linear(b, f"{name}.c_proj", context), key, value

    def _mlp(self, b: GraphBuilder, i: int, x: ir.Value) -> ir.Value:
        name = f"h.{i}.mlp"
        product = self._linear(b, f"{name}.c_fc", x)
        bias = self._parameter(b, f"{name}.c_fc.bias")
        return self._linear(b, f"{name}.c_proj", self._activate(b, f"{name}.act", product, bias))

    def _activate(self, b: GraphBuilder, name: str, x: ir.Value, bias: ir.Value) -> ir.Value:
        kind = self.config.activation
        if kind == "erf":
            return b.op("BiasGelu", [x, bias], domain=MICROSOFT, name=name)[0]
        if kind == "tanh":
            return b.op("FastGelu", [x, bias], domain=MICROSOFT, name=name)[0]
        (total,) = b.op("Add", [x, bias], name=f"{name}.in")
        if kind == "relu":
            return b.op("Relu", [total], name=name)[0]
        alpha = 1.702 if kind == "quick" else 1.0  # x * sigmoid(alpha * x); SiLU is alpha = 1
        return b.op("QuickGelu", [total], {"alpha": alpha}, domain=MICROSOFT, name=name)[0]

    def _last_positions(self, b: GraphBuilder, x: ir.Value, keep: ir.Value) -> ir.Value:
        """The last `keep` positions of (B, S, E): a prompt needs the head, a third of a small model, only once."""
        (start,) = b.op("Neg", [keep], name="kept.start")
        end, axis = b.constant([EVERYTHING], INT64, "kept.end"), b.constant([1], INT64, "one_1d")
        return b.op("Slice", [x, start, end, axis], name="kept")[0]

    def _head(self, b: GraphBuilder, x: ir.Value) -> ir.Value:
        """Logits in float32 on every target, from the embedding table itself when the head is tied."""
        x.dtype = self.dtype
        x = b.cast(x, FLOAT)
        weight = self.weights["wte.weight" if self.config.tied else "lm_head.weight"]
        if isinstance(weight, Quantized):
            logits = self._linear_quantized(b, weight, x, FLOAT)
        else:
            table = b.cast(b.weight(weight), FLOAT)  # (V, E): transB, for a Transpose node would hold it twice
            (logits,) = b.op("FusedMatMul", [x, table], {"transB": 1}, domain=MICROSOFT, name="lm_head")
        if "lm_head" in self.adapted:
            logits = add_low_rank(b, "lm_head", x, logits, weight.shape[::-1], FLOAT)
        logits.name, logits.dtype = "logits", FLOAT
        logits.shape = ir.Shape(["batch", "kept_sequence", self.config.vocab_size])
        return logits


def expected_shapes(config: Gpt2Config) -> dict[str, tuple[int, ...]]:
    """Every parameter of the architecture, by its name without prefix."""
    e, inner = config.n_embd, config.n_inner
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (config.vocab_size, e), "wpe.weight": (config.n_positions, e)}
    for i in range(config.n_layer):
        block: dict[str, tuple[int, ...]] = {
            "ln_1.weight": (e,),
            "ln_1.bias": (e,),
            "attn.c_attn.weight": (e, 3 * e),
            "attn.c_attn.bias": (3 * e,),
            "attn.c_proj.weight": (e, e),
            "attn.c_proj.bias": (e,),
            "ln_2.weight": (e,),
            "ln_2.bias": (e,),
            "mlp.c_fc.weight": (e, inner),
            "mlp.c_fc.bias": (inner,),
            "mlp.c_proj.weight": (inner, e),
            "mlp.c_proj.bias": (e,),
        }
        shapes |= {f"h.{i}.{name}": shape for name, shape in block.items()}
    shapes |= {"ln_f.weight": (e,), "ln_f.bias": (e,)}
    if not config.tied:
        shapes["lm_head.weight"] = (config.vocab_size, e)
    return shapes


def gpt2_weights(config: Gpt2Config, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """The architecture's parameters by name without prefix, shapes checked. InputRefused for one missing or unknown."""
    found = {name.removeprefix(PREFIX): weight for name, weight in weights.items() if not name.endswith(BUFFERS)}
    if config.tied:
        found.pop("lm_head.weight", None)  # transformers ties it to wte whatever the file holds
    expected = expected_shapes(config)
    for name, shape in expected.items():
        if name not in found:
            raise InputRefused(f"the tensor {name!r} is missing", expected=f"shape {shape}, as config.json says")
        if found[name].shape != shape:
            raise InputRefused(
                f"{name!r} has shape {found[name].shape}",
                expected=f"{shape}, as config.json says",
                todo="check that config.json and the weights belong together",
            )
    unknown = sorted(found.keys() - expected.keys())
    if unknown:
        raise InputRefused(
            f"{len(unknown)} tensor(s) that GPT2LMHeadModel does not have, such as {unknown[0]!r}",
            expected="the parameters of GPT2LMHeadModel and no more",
        )
    return {name: found[name] for name in expected}


def build_gpt2(
    config: Gpt2Config,
    weights: Mapping[str, Weight],
    target: str,
    metadata: dict[str, str],
    *,
    accuracy_level: int = 0,
    adapted: frozenset[str] = frozenset(),
) -> ir.Model:
    """The graph over `weights` (checkpoint names, with or without prefix). Raises InputRefused; reads no weight."""
    if target == "cuda" and config.reorder_and_upcast_attn:
        raise InputRefused(
            "config.json sets reorder_and_upcast_attn, which float16 attention does not honour",
            expected="attention in float32",
            todo="export with --target cpu",
        )
    return Gpt2Graph(config, gpt2_weights(config, weights), target, accuracy_level, adapted).build(metadata)
