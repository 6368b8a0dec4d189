"""A LoRA beside a matrix: y + (x A) B, with A and B inputs of any rank (none of them by default), or fixed."""

import onnx_ir as ir

from exporter.graph.builder import GraphBuilder

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
    (narrow,) = b.op("MatMul", [x, b.cast(a, dtype)], name=f"{module}.lora.down")  # (B, S, r)
    (delta,) = b.op("MatMul", [narrow, b.cast(z, dtype)], name=f"{module}.lora.up")  # (B, S, out)
    return b.op("Add", [y, delta], name=f"{module}.lora")[0]


def add_fixed_low_rank(
    b: GraphBuilder, name: str, x: ir.Value, y: ir.Value, a: ir.Value, z: ir.Value, dtype: ir.DataType
) -> ir.Value:
    """y + (x A) B with float32 A (in, r) and B (r, out); the sum over r is taken in float32, x and y are `dtype`."""
    x.dtype = dtype
    (narrow,) = b.op("MatMul", [b.cast(x, ir.DataType.FLOAT), a], name=f"{name}.lora.down")  # (B, S, r)
    (delta,) = b.op("MatMul", [narrow, z], name=f"{name}.lora.up")  # (B, S, out)
    delta.dtype = ir.DataType.FLOAT
    return b.op("Add", [y, b.cast(delta, dtype)], name=f"{name}.lora")[0]
