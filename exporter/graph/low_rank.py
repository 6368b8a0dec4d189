"""A LoRA as inputs of a graph: y + (x A) B, with A and B of any rank, and none of them by default."""

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
