"""An ONNX graph before a runtime opens it: its weights lie in its own directory, and it does what ours do.

A bundle comes with a manifest of its own, so a hash says nothing about who wrote the graph.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx

from exporter.errors import InputRefused
from exporter.sources.own_files import require_own_files

DOMAINS = ("", "ai.onnx", "com.microsoft")
# None of our graphs has a branch or a loop, and none makes a tensor whose size is a number in the graph.
NOT_OURS = frozenset({"Loop", "Scan", "If", "ConstantOfShape", "SequenceMap", "Optional"})
# The same of graphs that optimum traces; they make masks of the size of their input.
NOT_TRACED = NOT_OURS - {"ConstantOfShape"}
SIZE = 2 << 30  # protobuf's own limit


def load_graph(path: Path) -> onnx.ModelProto:
    """The graph without its weights; InputRefused if it is no ONNX model or names weights outside its directory."""
    require_own_files(path.parent)
    try:
        if path.stat().st_size > SIZE:
            raise InputRefused(f"{path} is larger than {SIZE} bytes", expected="a graph whose weights lie beside it")
        model = onnx.load(path, load_external_data=False)
    except InputRefused:
        raise
    except Exception as error:  # protobuf raises DecodeError of its C++ or its Python implementation
        raise InputRefused(
            f"{path} is not an ONNX model ({str(error)[:200]})", expected="a model.onnx", todo="export it again"
        ) from error
    for tensor in _all_tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _require_inside(path, tensor)
    return model


def require_our_operators(path: Path, model: onnx.ModelProto, refused: frozenset[str] = NOT_OURS) -> None:
    """InputRefused for operators that no builder of ours writes: what a graph computes is then bounded by its size.

    refused: of the standard operators; those of other domains always are.
    """
    nodes = [node for function in model.functions for node in function.node] + list(model.graph.node)
    for node in nodes:
        if node.domain not in DOMAINS or node.op_type in refused:
            raise InputRefused(
                f"{path} holds the operator {node.domain + '.' if node.domain else ''}{node.op_type}",
                expected="a graph as exporter writes it",
                todo="export it again",
            )
    names = {value.name for value in model.graph.output}
    wanted = {"logits"} | {
        value.name.replace("past_key_values.", "present.")
        for value in model.graph.input
        if value.name.startswith("past_key_values.")
    }
    if len(wanted) < 3 or not wanted <= names:
        raise InputRefused(
            f"{path} has no {', '.join(sorted(wanted - names)[:3]) or 'cache'}",
            expected="logits and a cache of keys and values",
            todo="export it again",
        )


def _all_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from _tensors(model.graph)
    for function in model.functions:
        yield from _attribute_tensors(function.node)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _attribute_tensors(graph.node)


def _attribute_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for graph in (attribute.g, *attribute.graphs):
                if graph.node or graph.initializer:
                    yield from _tensors(graph)


def _require_inside(path: Path, tensor: onnx.TensorProto) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    refusal = InputRefused(
        f"{path.name} reads the tensor {tensor.name[:120]!r} from {location[:120]!r}, "
        f"offset {entries.get('offset', '0')[:40]}, length {entries.get('length', 'to the end')[:40]}",
        expected=f"bytes of a file in {path.parent}, which is no link",
        todo="export it again",
    )
    if len(location.encode()) > 255 or "\0" in location or Path(location).name != location:
        raise refusal
    file = path.parent / location
    if file.is_symlink() or not file.is_file():
        raise refusal
    numbers = [entries[key] for key in ("offset", "length") if key in entries]
    if not all(number.isascii() and number.isdigit() and len(number) < 20 for number in numbers):
        raise refusal
    if sum(map(int, numbers)) > file.stat().st_size:
        raise refusal
