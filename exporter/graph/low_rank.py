"""A LoRA beside a matrix: y + (x A) B, with A and B inputs of any rank (none of them by default), or fixed."""

import onnx_ir as ir

from exporter.graph.builder import MICROSOFT, GraphBuilder

FACTORS = ("lora_A", "lora_B")


def factor_names(module: str) -> tuple[str, str]:
    """The inputs for A (in, r) and B (r, out) of `module`."""
    first, second = (f"{module}.{factor}" for factor in FACTORS)
    return first, second


def add_low_rank(
    b: GraphBuilder, module: str, x: ir.Value, y: ir.Value, shape: tuple[int, ...], dtype: ir.DataType
) -> ir.Value:
    """y + (x A) B for y = x W with W of `shape` (in, out); at rank 0, the default, y itself.

    A and B are float32 on every target, so that one file of factors serves all of them; they are cast to `dtype`.
    """
    inputs, outputs = shape
    down, up = factor_names(module)
    a = b.empty_input(down, ir.DataType.FLOAT, [inputs, f"{module}.rank"])
    z = b.empty_input(up, ir.DataType.FLOAT, [f"{module}.rank", outputs])
    narrow = _product(b, x, b.cast(a, dtype), 0.5, f"{module}.lora.down")  # (B, S, r)
    delta = _product(b, narrow, b.cast(z, dtype), 2.0, f"{module}.lora.up")  # (B, S, out)
    return b.op("Add", [y, delta], name=f"{module}.lora")[0]


def _product(b: GraphBuilder, x: ir.Value, w: ir.Value, alpha: float, name: str) -> ir.Value:
    """alpha x w. A plain product, alpha 1, of a single row takes another kernel where w is no constant (MLAS sgemm),
    and what a stream gets would depend on how many run beside it. Powers of two that cancel round nothing.
    """
    if w.dtype == ir.DataType.FLOAT:
        return b.op("FusedMatMul", [x, w], {"alpha": alpha}, domain=MICROSOFT, name=name)[0]
    return b.op("MatMul", [x, w], name=name)[0]  # FusedMatMul on a CPU is float32 alone


def add_fixed_low_rank(
    b: GraphBuilder, name: str, x: ir.Value, y: ir.Value, a: ir.Value, z: ir.Value, dtype: ir.DataType
) -> ir.Value:
    """y + (x A) B with float32 A (in, r) and B (r, out); the sum over r is taken in float32, x and y are `dtype`."""
    x.dtype = dtype
    (narrow,) = b.op("MatMul", [b.cast(x, ir.DataType.FLOAT), a], name=f"{name}.lora.down")  # (B, S, r)
    (delta,) = b.op("MatMul", [narrow, z], name=f"{name}.lora.up")  # (B, S, out)
    delta.dtype = ir.DataType.FLOAT
    return b.op("Add", [y, b.cast(delta, dtype)], name=f"{name}.lora")[0]
