"""What a processor's kernels do with one row, from ONNX Runtime alone: its `MatMulNBits` over random codes."""

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, numpy_helper
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info

ROWS, INPUTS, OUTPUTS, BLOCK = 8, 128, 256, 32


def takes_one_row_apart(bits: int) -> bool:
    """True where a row computed alone has other bits than among several: at 4 bits on processors with AVX2 only."""
    random = np.random.default_rng(0)
    codes = random.integers(0, 256, (OUTPUTS, INPUTS // BLOCK, BLOCK * bits // 8), dtype=np.uint8)
    scales = random.random((OUTPUTS, INPUTS // BLOCK), dtype=np.float32)
    rows = random.standard_normal((ROWS, INPUTS), dtype=np.float32)
    node = make_node(
        "MatMulNBits",
        ["x", "codes", "scales"],
        ["y"],
        domain="com.microsoft",
        K=INPUTS,
        N=OUTPUTS,
        bits=bits,
        block_size=BLOCK,
        accuracy_level=4,
    )
    graph = make_graph(
        [node],
        "product",
        [make_tensor_value_info("x", TensorProto.FLOAT, ["rows", INPUTS])],
        [make_tensor_value_info("y", TensorProto.FLOAT, ["rows", OUTPUTS])],
        [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales, "scales")],
    )
    opsets = [make_opsetid("", 21), make_opsetid("com.microsoft", 1)]
    model = make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def product(some: np.ndarray) -> np.ndarray:
        return np.asarray(session.run(None, {"x": some})[0])

    together = product(rows)
    return any(not np.array_equal(product(rows[n : n + 1]), together[n : n + 1]) for n in range(ROWS))
