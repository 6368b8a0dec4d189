"""A thin pen for onnx-ir: nodes, constants, and initializers that lie in a safetensors file."""

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from exporter.errors import InputRefused
from exporter.sources.tensors import TensorInfo

# 21 is the first opset that optimum, onnxruntime-genai and every supported onnxruntime agree on; IR 10 goes with it.
OPSET, IR_VERSION = 21, 10
MICROSOFT = "com.microsoft"
PRODUCER = "exporter"
Attribute = int | float | str | Sequence[int]

DTYPES = {
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "F32": ir.DataType.FLOAT,
    "F64": ir.DataType.DOUBLE,
    "U8": ir.DataType.UINT8,
}


def exporter_version() -> str:
    try:
        return version("exporter")
    except PackageNotFoundError:
        return "unknown"


class GraphBuilder:
    """Collects nodes in order. A weight's bytes are never read: its initializer says where they lie."""

    def __init__(self) -> None:
        self._nodes: list[ir.Node] = []
        self._initializers: dict[str, ir.Value] = {}
        self._empty_inputs: list[ir.Value] = []

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))

    def optional_input(self, name: str, dtype: ir.DataType, default: Sequence[int]) -> ir.Value:
        """An input that a caller may leave out: an initializer of the same name holds its default."""
        return self.constant(default, dtype, name)

    def empty_input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """An input that a caller may leave out: its default has size 0 along the named dimensions of `shape`."""
        array = np.zeros([0 if isinstance(size, str) else size for size in shape], dtype.numpy())
        tensor = ir.tensor(array, dtype=dtype, name=name)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=tensor)
        self._initializers[name] = value
        self._empty_inputs.append(value)
        return value

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Attribute] | None = None,
        *,
        domain: str = "",
        name: str,
        outputs: int = 1,
    ) -> list[ir.Value]:
        """Append a node; its outputs are called `name`, `name.1`, ..."""
        values = [ir.Value(name=name if i == 0 else f"{name}.{i}") for i in range(outputs)]
        self._nodes.append(ir.node(op_type, inputs, attributes or {}, domain=domain, outputs=values, name=name))
        return values

    def constant(self, value: int | float | Sequence[int], dtype: ir.DataType, name: str) -> ir.Value:
        """A small initializer inside the graph file, made once per name."""
        if name not in self._initializers:
            array = np.array(value, dtype=dtype.numpy())
            tensor = ir.tensor(array, dtype=dtype, name=name)
            self._initializers[name] = ir.Value(
                name=name, type=ir.TensorType(dtype), shape=ir.Shape(array.shape), const_value=tensor
            )
        return self._initializers[name]

    def table(self, values: np.ndarray, dtype: ir.DataType, name: str) -> ir.Value:
        """A computed initializer inside the graph file, in `dtype`."""
        tensor = ir.tensor(values.astype(dtype.numpy()), dtype=dtype, name=name)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(values.shape), const_value=tensor)
        self._initializers[name] = value
        return value

    def weight(self, info: TensorInfo, *, name: str = "", shape: Sequence[int] | None = None) -> ir.Value:
        """The stored tensor as an initializer; `name` and `shape` give the same bytes a second view."""
        name, shape = name or info.name, tuple(info.shape if shape is None else shape)
        if name not in self._initializers:
            if info.dtype not in DTYPES:
                raise InputRefused(f"{info.name} is stored as {info.dtype}", expected="one of " + ", ".join(DTYPES))
            tensor = ir.ExternalTensor(
                info.file.name, info.offset, info.nbytes, DTYPES[info.dtype], shape=ir.Shape(shape), name=name
            )
            self._initializers[name] = ir.Value(
                name=name, type=ir.TensorType(DTYPES[info.dtype]), shape=ir.Shape(shape), const_value=tensor
            )
        return self._initializers[name]

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """`value` itself if it has `dtype`, else a Cast: ONNX Runtime folds it for a weight when it loads."""
        if value.dtype == dtype:
            return value
        (result,) = self.op("Cast", [value], {"to": int(dtype)}, name=f"{value.name}.as.{dtype.name.lower()}")
        result.dtype = dtype
        return result

    def graph(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Graph:
        """`inputs` come first; what `empty_input` made follows."""
        return ir.Graph(
            [*inputs, *self._empty_inputs],
            outputs,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": OPSET, MICROSOFT: 1},
            name="main",
        )


def model_of(graph: ir.Graph, metadata: dict[str, str]) -> ir.Model:
    return ir.Model(
        graph,
        ir_version=IR_VERSION,
        producer_name=PRODUCER,
        producer_version=exporter_version(),
        metadata_props=metadata,
    )


def serialize(model: ir.Model) -> bytes:
    """The .onnx file: references to the weights, no weights."""
    return ir.serde.serialize_model(model).SerializeToString()


def is_ours(path: Path) -> bool:
    """True if `path` is a graph that this program wrote."""
    try:
        return onnx.load(path, load_external_data=False).producer_name == PRODUCER
    except (OSError, DecodeError):  # not a graph at all
        return False
