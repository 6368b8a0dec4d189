"""From a padding mask to what GroupQueryAttention wants: lengths, and on a CPU a bias."""

from dataclasses import dataclass

import onnx_ir as ir

from exporter.graph.builder import GraphBuilder

# Half of float32's lowest value: adding a score to it stays finite, so a row that sees only padding gives no NaN.
MASKED = -1.7014118e38


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """seqlens_k int32 (B,): the last cache slot each row reads; total int32 (): slots read by the longest row."""

    seqlens_k: ir.Value
    total: ir.Value
    bias: ir.Value | None  # float32 (B, 1, S, total)


def biased_attention_inputs(b: GraphBuilder, input_ids: ir.Value, mask: ir.Value) -> AttentionInputs:
    """For targets whose kernel takes a bias (CPU): padding anywhere is exact.

    The new tokens go into the slots that end at seqlens_k. A row's last slot is the last 1 of its mask, so a decode
    step may append ones behind a row's own tokens (rows of unequal length, cache slots without holes) or at the end
    of the mask (holes, masked by the bias; what optimum and genai do). A prompt of several tokens fills the slots of
    the whole batch: with right padding its shorter rows write their padding too, and the bias hides it for good.
    """
    lengths = _lengths(b, input_ids, mask)
    bits = b.cast(mask, ir.DataType.INT32)
    (last,) = b.op("ArgMax", [bits], {"axis": 1, "keepdims": 0, "select_last_index": 1}, name="mask.last")
    one = b.constant(1, ir.DataType.INT64, "one")
    (new_less_one,) = b.op("Sub", [lengths.new, one], name="new_less_one")
    (is_prompt,) = b.op("Min", [new_less_one, one], name="is_prompt")  # 1 for several tokens, 0 for one
    (total_less_one,) = b.op("Sub", [lengths.total, one], name="total_less_one")
    (prompt_last,) = b.op("Mul", [is_prompt, total_less_one], name="prompt_last")
    (slot,) = b.op("Max", [last, prompt_last], name="last_slot")  # (B,)

    hidden = b.constant(MASKED, ir.DataType.FLOAT, "masked")
    seen = b.constant(0.0, ir.DataType.FLOAT, "seen")
    (visible,) = b.op("Cast", [mask], {"to": int(ir.DataType.BOOL)}, name="mask.visible")
    (row,) = b.op("Where", [visible, seen, hidden], name="mask.row")  # (B, total)
    (row4,) = b.op("Unsqueeze", [row, b.constant([1, 2], ir.DataType.INT64, "axes_1_2")], name="mask.row4")
    one_1d = b.constant([1], ir.DataType.INT64, "one_1d")
    (shape,) = b.op("Concat", [one_1d, one_1d, lengths.new_1d, one_1d], {"axis": 0}, name="bias.shape")
    (bias,) = b.op("Expand", [row4, shape], name="attention_bias")  # (B, 1, S, total)
    return AttentionInputs(b.cast(slot, ir.DataType.INT32), b.cast(lengths.total, ir.DataType.INT32), bias)


def packed_attention_inputs(b: GraphBuilder, input_ids: ir.Value, mask: ir.Value) -> AttentionInputs:
    """For targets without a bias (CUDA): right padding only; a row's slots are the first sum(mask) ones."""
    lengths = _lengths(b, input_ids, mask)
    (count,) = b.op("ReduceSum", [mask, b.constant([1], ir.DataType.INT64, "one_1d")], {"keepdims": 0}, name="mask.sum")
    (last,) = b.op("Sub", [count, b.constant(1, ir.DataType.INT64, "one")], name="last_slot")
    return AttentionInputs(b.cast(last, ir.DataType.INT32), b.cast(lengths.total, ir.DataType.INT32), None)


@dataclass(frozen=True, slots=True)
class _Lengths:
    new: ir.Value  # int64 (): S
    new_1d: ir.Value  # int64 (1,)
    total: ir.Value  # int64 (): past + S


def _lengths(b: GraphBuilder, input_ids: ir.Value, mask: ir.Value) -> _Lengths:
    (new_1d,) = b.op("Shape", [input_ids], {"start": 1, "end": 2}, name="new_1d")
    (total_1d,) = b.op("Shape", [mask], {"start": 1, "end": 2}, name="total_1d")
    zero_1d = b.constant([0], ir.DataType.INT64, "zero_1d")
    (new,) = b.op("Squeeze", [new_1d, zero_1d], name="new")
    (total,) = b.op("Squeeze", [total_1d, zero_1d], name="total")
    for value in (new, total):
        value.dtype = ir.DataType.INT64
    return _Lengths(new, new_1d, total)
