"""The weights of a traced graph under the checkpoint's own names and in its orientation, so that verify can read them.

A tracer renames what it folds: the weight of a linear layer becomes `onnx::MatMul_733`, transposed. Values tell which
tensor of the checkpoint an initializer is; masks and small constants are none, and stay inside of the graph.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from exporter.errors import InputRefused
from exporter.files import human_bytes
from exporter.graph.quantized_file import Stored, write_weights
from exporter.graph.weights import WEIGHTS
from exporter.progress import SILENT, Progress
from exporter.sources.checkpoint import Checkpoint
from exporter.sources.safetensors_file import read_header
from exporter.sources.tensors import FLOATS, TensorInfo
from exporter.sources.values import read_tensor

INSIDE = 1 << 30  # bytes of initializers that may stay in a graph: protobuf's own limit is 2 GB
TRANSPOSED = ".transposed"
Key = tuple[tuple[int, ...], bytes]  # a shape, and the digest of float32 values


@dataclass(frozen=True, slots=True)
class Placed:
    """What became of the checkpoint's tensors, by name.

    digests: SHA-256 of each tensor of the weights file. shared: tensors without an initializer of their own (a tracer
    keeps one of several that are equal), and the name of the one that stands for each.
    missing: tensors of the checkpoint that no initializer equals. The graph does not read them as they are, so they
    are left out, and verify names those that are parameters of the model.
    """

    digests: Mapping[str, str]
    shared: Mapping[str, str]
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Match:
    """An initializer of the traced graph, the checkpoint's tensor with its values, and whether as the transpose."""

    initializer: str
    tensor: str
    transposed: bool


def place_weights(graph: Path, checkpoint: Checkpoint, progress: Progress = SILENT) -> Placed:
    """Rewrite `graph` to read the checkpoint's tensors, in float32, from weights.safetensors beside it.

    A tensor is read at a time. The graph computes the same: a transposed weight goes through a Transpose, which ONNX
    Runtime folds when it opens the graph. InputRefused: values that are not finite, weights that are no tensor of the
    checkpoint and do not fit into a graph.
    """
    model = onnx.load(graph, load_external_data=False)
    names = _names_by_value(checkpoint)
    matches = _match(model, graph.parent, names, progress)
    used = {match.tensor for match in matches}
    equal = {name: same for same in names.values() for name in same}
    shared = {
        name: next(one for one in equal[name] if one in used)
        for name in equal
        if name not in used and used & set(equal[name])
    }
    stored = {name: Stored(checkpoint.tensors[name], "F32") for name in equal if name in used or name in shared}
    digests = write_weights(graph.with_name(WEIGHTS), stored, progress) if stored else {}
    _keep_inside(model, graph, {match.initializer for match in matches})
    _point(model, matches, read_header(graph.with_name(WEIGHTS))[0] if stored else {})
    graph.write_bytes(model.SerializeToString())
    return Placed(digests, shared, tuple(sorted(equal.keys() - stored.keys())))


def _names_by_value(checkpoint: Checkpoint) -> dict[Key, list[str]]:
    """The checkpoint's floating-point tensors; several names where several are equal (tied, or all zeros)."""
    names: dict[Key, list[str]] = {}
    for name, info in checkpoint.tensors.items():
        if info.dtype in FLOATS:
            names.setdefault(_key(read_tensor(info).float().numpy()), []).append(name)
    return names


def _match(
    model: onnx.ModelProto, directory: Path, names: Mapping[Key, Sequence[str]], progress: Progress
) -> list[_Match]:
    """Initializers that bear a checkpoint name come first; a name is given twice only where there are too few."""
    known = {name for same in names.values() for name in same}
    floats = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    floats.sort(key=lambda tensor: tensor.name not in known)
    matches, taken = list[_Match](), set[str]()
    with progress.task("find the checkpoint's tensors in the graph", len(floats)) as task:
        for tensor in floats:
            for transposed, key in _keys(tensor, directory):
                if same := names.get(key):
                    free = [name for name in same if name not in taken]
                    name = tensor.name if tensor.name in same else (free or same)[0]
                    matches.append(_Match(tensor.name, name, transposed))
                    taken.add(name)
                    break
            task.advance()
    _require_free(model, matches)
    return matches


def _require_free(model: onnx.ModelProto, matches: Sequence[_Match]) -> None:
    """InputRefused where the graph gives a tensor's name to a value that is not the tensor's."""
    written = {name for node in model.graph.node for name in node.output}
    others = {tensor.name for tensor in model.graph.initializer} - {match.initializer for match in matches}
    taken = (written | others | {value.name for value in model.graph.input}) & {match.tensor for match in matches}
    if taken:
        raise InputRefused(
            f"the traced graph calls another value {min(taken)!r}",
            expected="the checkpoint's values under the checkpoint's names",
        )


def _keys(tensor: onnx.TensorProto, directory: Path) -> Iterator[tuple[bool, Key]]:
    values = onnx.numpy_helper.to_array(tensor, str(directory))
    yield False, _key(values)
    if values.ndim == 2:
        yield True, _key(values.T)


def _key(values: NDArray) -> Key:
    return values.shape, hashlib.sha256(np.ascontiguousarray(values, np.float32).data).digest()


def _keep_inside(model: onnx.ModelProto, graph: Path, moved: set[str]) -> None:
    """What is no tensor of the checkpoint becomes part of the graph's own file."""
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in moved]
    nbytes = sum(_nbytes(tensor) for tensor in kept)
    if nbytes > INSIDE:
        largest = sorted(kept, key=_nbytes)[-3:]
        raise InputRefused(
            f"{human_bytes(nbytes)} of the traced graph equal no tensor of the checkpoint, such as "
            + ", ".join(f"{tensor.name} {tuple(tensor.dims)}" for tensor in largest),
            expected=f"at most {human_bytes(INSIDE)} of masks and constants: optimum computes these from the weights",
        )
    for tensor in kept:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            values = onnx.numpy_helper.to_array(tensor, str(graph.parent))
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def _nbytes(tensor: onnx.TensorProto) -> int:
    return int(np.prod(tensor.dims)) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _point(model: onnx.ModelProto, matches: Sequence[_Match], places: Mapping[str, TensorInfo]) -> None:
    """Initializers named for the file's tensors, a Transpose behind those that the graph reads transposed."""
    moved = {match.initializer for match in matches}
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in moved]
    outside = [_external(places[name]) for name in dict.fromkeys(match.tensor for match in matches)]
    turned = dict.fromkeys(match.tensor for match in matches if match.transposed)
    turns = [onnx.helper.make_node("Transpose", [name], [name + TRANSPOSED], name + TRANSPOSED) for name in turned]
    _rename(
        model.graph.node,
        {match.initializer: match.tensor + (TRANSPOSED if match.transposed else "") for match in matches},
    )
    nodes = [*turns, *model.graph.node]
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend([*outside, *kept])
    model.graph.node.extend(nodes)


def _rename(nodes: Iterable[onnx.NodeProto], names: Mapping[str, str]) -> None:
    """What the nodes read, and the nodes of graphs inside of them."""
    for node in nodes:
        node.input[:] = [names.get(name, name) for name in node.input]
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                _rename(graph.node, names)


def _external(info: TensorInfo) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=info.name, data_type=onnx.TensorProto.FLOAT, dims=info.shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": info.file.name, "offset": info.offset, "length": info.nbytes}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor
