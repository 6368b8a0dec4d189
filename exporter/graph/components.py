"""What decoders are made of, each a few nodes: embedding, layer norm, matrices, attention over a cache, head."""

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from exporter.graph.attention_inputs import AttentionInputs, biased_attention_inputs, packed_attention_inputs
from exporter.graph.builder import DTYPES, MICROSOFT, GraphBuilder
from exporter.graph.low_rank import add_fixed_low_rank, add_low_rank
from exporter.graph.weights import Quantized, Weight

# An optional input, int64 (1,): for how many of the last positions logits are computed; all of them by default.
LOGITS_TO_KEEP = "logits_to_keep"
EVERYTHING = (1 << 63) - 1
# MatMulNBits quantizes its activations to int8 at level 4; without it 4-bit decoding on a CPU is about 2.3x slower.
ACCURACY_LEVEL = {"cpu": 4, "cuda": 0}
INT64, FLOAT, FLOAT16 = ir.DataType.INT64, ir.DataType.FLOAT, ir.DataType.FLOAT16
KeyValue = tuple[ir.Value, ir.Value]


@dataclass(frozen=True, slots=True)
class Inputs:
    """input_ids and position_ids int64 (B, S); past: key and value of each layer, (B, heads, past, head size)."""

    input_ids: ir.Value
    mask: ir.Value
    position_ids: ir.Value
    past: tuple[KeyValue, ...]
    lengths: AttentionInputs


@dataclass(frozen=True, slots=True)
class Components:
    """Nodes over `weights`, which are not read.

    weights: by name without prefix. target: cpu (float32 activations and cache, exact padding anywhere) or cuda
    (float16, right padding only). accuracy_level: of MatMulNBits, 4 = int8 activations. adapted: modules whose LoRA
    factors are inputs, such as h.0.attn.c_attn.
    """

    b: GraphBuilder
    weights: Mapping[str, Weight]
    target: str
    accuracy_level: int
    adapted: frozenset[str]

    @property
    def dtype(self) -> ir.DataType:
        """Of activations and cache."""
        return FLOAT if self.target == "cpu" else FLOAT16

    def inputs(self, n_layer: int, n_head: int, head_size: int) -> Inputs:
        b = self.b
        input_ids = b.input("input_ids", INT64, ["batch", "sequence"])
        mask = b.input("attention_mask", INT64, ["batch", "total_sequence"])
        position_ids = b.input("position_ids", INT64, ["batch", "sequence"])
        shape = ["batch", n_head, "past_sequence", head_size]
        past = tuple(
            (
                b.input(f"past_key_values.{i}.key", self.dtype, shape),
                b.input(f"past_key_values.{i}.value", self.dtype, shape),
            )
            for i in range(n_layer)
        )
        lengths = (biased_attention_inputs if self.target == "cpu" else packed_attention_inputs)(b, input_ids, mask)
        return Inputs(input_ids, mask, position_ids, past, lengths)

    def parameter(self, name: str) -> ir.Value:
        """A weight as it is, in the activations' type."""
        weight = self.weights[name]
        assert not isinstance(weight, Quantized), name
        return self.b.cast(self.b.weight(weight), self.dtype)

    def embed(self, name: str, ids: ir.Value) -> ir.Value:
        """Rows (B, S, E) of a table."""
        weight = self.weights[name]
        if isinstance(weight, Quantized):
            return self._embed_quantized(weight, ids)
        # the rows are cast, not the table
        (rows,) = self.b.op("Gather", [self.b.weight(weight), ids], name=f"{name}.rows")
        rows.dtype = DTYPES[weight.dtype]
        return self.b.cast(rows, self.dtype)

    def _embed_quantized(self, weight: Quantized, ids: ir.Value) -> ir.Value:
        b = self.b
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

    def norm(self, name: str, x: ir.Value, epsilon: float) -> ir.Value:
        """The layer norm of x."""
        inputs = [x, self.parameter(f"{name}.weight"), self.parameter(f"{name}.bias")]
        return self.b.op("LayerNormalization", inputs, {"axis": -1, "epsilon": epsilon}, name=name)[0]

    def add_norm(self, name: str, x: ir.Value, residual: ir.Value, bias: str | None, epsilon: float) -> KeyValue:
        """The layer norm of x + residual + bias, and that sum."""
        inputs = [x, residual, self.parameter(f"{name}.weight"), self.parameter(f"{name}.bias")]
        if bias is not None:
            inputs.append(self.parameter(bias))
        normed, _, _, total = self.b.op(
            "SkipLayerNormalization", inputs, {"epsilon": epsilon}, domain=MICROSOFT, name=name, outputs=4
        )
        return normed, total

    def conv1d(self, name: str, x: ir.Value) -> ir.Value:
        """x W with W stored (in, out), without the bias: the next node takes it in."""
        weight = self.weights[f"{name}.weight"]
        if isinstance(weight, Quantized):
            y = self._linear_quantized(weight, x, self.dtype)
        else:
            (y,) = self.b.op("MatMul", [x, self.parameter(f"{name}.weight")], name=name)
        return self._adapt(name, x, y, weight.shape, self.dtype)

    def linear(self, name: str, x: ir.Value, dtype: ir.DataType | None = None, weight_of: str = "") -> ir.Value:
        """x W^T with W stored (out, in), without the bias, in `dtype` or that of activations.

        weight_of: the module whose weight it shares, for a head that is tied to the embedding.
        """
        dtype = dtype or self.dtype
        weight = self.weights[f"{weight_of or name}.weight"]
        if isinstance(weight, Quantized):
            y = self._linear_quantized(weight, x, dtype)
        else:  # transB, for a Transpose node would hold the matrix twice
            table = self.b.cast(self.b.weight(weight), dtype)
            (y,) = self.b.op("FusedMatMul", [x, table], {"transB": 1}, domain=MICROSOFT, name=name)
        return self._adapt(name, x, y, weight.shape[::-1], dtype)

    def _linear_quantized(self, weight: Quantized, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        b = self.b
        inputs = [x, b.weight(weight.codes), b.cast(b.weight(weight.scales), dtype)]
        attributes = {"K": weight.columns, "N": weight.rows, "bits": weight.bits, "block_size": weight.block}
        if self.accuracy_level:
            attributes["accuracy_level"] = self.accuracy_level
        (y,) = b.op("MatMulNBits", inputs, attributes, domain=MICROSOFT, name=f"{weight.name}.product")
        if weight.down is None or weight.up is None:
            return y
        return add_fixed_low_rank(b, weight.name, x, y, b.weight(weight.down), b.weight(weight.up), dtype)

    def _adapt(self, name: str, x: ir.Value, y: ir.Value, shape: tuple[int, ...], dtype: ir.DataType) -> ir.Value:
        return add_low_rank(self.b, name, x, y, shape, dtype) if name in self.adapted else y

    def attention(
        self, name: str, i: int, qkv: tuple[ir.Value, ir.Value | None, ir.Value | None], given: Inputs, scale: float
    ) -> tuple[ir.Value, KeyValue]:
        """Causal attention of layer i over its cache: (B, S, E), and the cache with the new keys and values.

        qkv: (B, S, E) each, or one q|k|v of (B, S, 3 E).
        """
        past, lengths = given.past[i], given.lengths
        heads, head_size = past[0].shape[1], past[0].shape[3]  # pyright: ignore[reportOptionalSubscript]
        assert isinstance(heads, int)
        inputs = [*qkv, *past, lengths.seqlens_k, lengths.total]
        if lengths.bias is not None:
            inputs += [None, None, None, lengths.bias]
        attributes = {"num_heads": heads, "kv_num_heads": heads, "scale": scale}
        context, *present = self.b.op("GroupQueryAttention", inputs, attributes, domain=MICROSOFT, name=name, outputs=3)
        key, value = present
        for kind, one in (("key", key), ("value", value)):
            one.name, one.dtype = f"present.{i}.{kind}", self.dtype
            one.shape = ir.Shape(["batch", heads, "present_sequence", head_size])
        return context, (key, value)

    def activate(self, name: str, kind: str, x: ir.Value, bias: ir.Value) -> ir.Value:
        """f(x + bias), `kind` a value of ACTIVATIONS."""
        if kind == "erf":
            return self.b.op("BiasGelu", [x, bias], domain=MICROSOFT, name=name)[0]
        if kind == "tanh":
            return self.b.op("FastGelu", [x, bias], domain=MICROSOFT, name=name)[0]
        total = self.add(f"{name}.in", x, bias)
        if kind == "relu":
            return self.b.op("Relu", [total], name=name)[0]
        alpha = 1.702 if kind == "quick" else 1.0  # x * sigmoid(alpha * x); SiLU is alpha = 1
        return self.b.op("QuickGelu", [total], {"alpha": alpha}, domain=MICROSOFT, name=name)[0]

    def add(self, name: str, x: ir.Value, y: ir.Value) -> ir.Value:
        return self.b.op("Add", [x, y], name=name)[0]

    def last_positions(self, x: ir.Value, keep: ir.Value) -> ir.Value:
        """The last `keep` positions of (B, S, E): a prompt needs the head, a third of a small model, only once."""
        b = self.b
        (start,) = b.op("Neg", [keep], name="kept.start")
        end, axis = b.constant([EVERYTHING], INT64, "kept.end"), b.constant([1], INT64, "one_1d")
        return b.op("Slice", [x, start, end, axis], name="kept")[0]

    def finish(
        self, given: Inputs, normed: ir.Value, present: list[ir.Value], *, head: str, weight_of: str, vocab_size: int
    ) -> ir.Graph:
        """The whole graph: `present` and the logits of `normed`, in float32 on every target.

        weight_of: the module whose weight the head has, the embedding's where they are tied.
        """
        keep = self.b.optional_input(LOGITS_TO_KEEP, INT64, [EVERYTHING])
        x = self.last_positions(normed, keep)
        x.dtype = self.dtype
        logits = self.linear(head, self.b.cast(x, FLOAT), FLOAT, weight_of)
        logits.name, logits.dtype = "logits", FLOAT
        logits.shape = ir.Shape(["batch", "kept_sequence", vocab_size])
        cache = [value for pair in given.past for value in pair]
        inputs = [given.input_ids, given.mask, given.position_ids, *cache, keep]
        return self.b.graph(inputs, [logits, *present])
