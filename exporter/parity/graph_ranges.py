"""A graph run as ranges of its nodes, one range's weights in memory at a time: for graphs larger than memory.

The graph is the bundle's own, cut in front of normalizations; nothing here knows an architecture. What a later range
reads of an earlier one is kept on disk. What follows from weights alone, such as their Cast, is computed where it is
used. All calls go through a range before the next one is opened.
"""

import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from exporter.parity.documents import Document
from exporter.parity.graphs import Call, feeds_of, open_graph, present_name
from exporter.progress import SILENT, Progress
from exporter.runtime.memory import free_memory

Float32 = NDArray[np.float32]
PAST = "past_key_values."
FLOAT_TYPES = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)
SHARE = 0.35  # of free memory for one range: while it opens, onnxruntime holds weights as stored and as float32
LEAST = 3  # ranges


def graph_nbytes(model: onnx.ModelProto) -> int:
    """Bytes of a graph's weights as a CPU session holds them: floats become float32."""
    return sum(map(_nbytes, model.graph.initializer))


class RangedGraph:
    """Runs calls as a GraphSession does. scratch: a directory for the values between ranges."""

    def __init__(
        self, model: onnx.ModelProto, directory: Path, target: str, scratch: Path, progress: Progress = SILENT
    ) -> None:
        self._graph, self._progress = _Graph(model), progress
        self._directory, self._target, self._scratch = directory, target, scratch
        self.ranges = self._graph.cut(int(min(SHARE * free_memory("cpu"), graph_nbytes(model) / LEAST)))

    def logits(self, token_ids: Sequence[int], /) -> Float32:
        """float32 (T, V) of one unpadded row. Opens every range."""
        (logits,) = self.run([Call(np.array([list(token_ids)]))])
        return logits[0]

    def run(self, calls: Sequence[Call]) -> Iterator[Float32]:
        """The logits (B, S, V) of each call, in order; one call's at a time are in memory."""
        with tempfile.TemporaryDirectory(prefix="ranges-", dir=self._scratch) as name:
            places = [Path(name) / str(index) for index in range(len(calls))]
            for place in places:
                place.mkdir()
            *earlier, last = self.ranges
            with self._progress.task(f"{self._directory.name}, range by range", len(earlier), "ranges") as task:
                for nodes in earlier:
                    for _ in self._run_range(nodes, calls, places):
                        task.advance(1 / len(calls))
            for found in self._run_range(last, calls, places):
                yield np.asarray(found["logits"], np.float32)

    def _run_range(self, nodes: slice, calls: Sequence[Call], places: Sequence[Path]) -> Iterator[dict[str, NDArray]]:
        """All outputs of one range, call by call. What later ranges read goes to disk, caches to calls that follow."""
        carried, live = self._graph.carried(nodes), self._graph.live(nodes)
        followed, caches = {call.after for call in calls}, dict[int | None, list[NDArray]]()
        session, past, names = None, [], []
        for index, call in enumerate(calls):
            given = {name: np.load(places[index] / _file(name)) for name in carried}
            if session is None:
                session = open_graph(self._graph.extract(nodes, given), self._directory, self._target)
                past = [value for value in session.get_inputs() if value.name.startswith(PAST)]
                names = [value.name for value in session.get_outputs()]
            wanted = {value.name for value in session.get_inputs()}
            feeds = {k: v for k, v in feeds_of(call, past, caches.get(call.after, [])).items() if k in wanted} | given
            found = {k: np.asarray(v) for k, v in zip(names, session.run(names, feeds), strict=True)}
            for name in live:
                np.save(places[index] / _file(name), found[name])
            if index in followed:
                caches[index] = [found[present_name(value.name)] for value in past]
            yield found


class RangedScorer:
    """A Scorer over documents, in their order: all go through the graph together."""

    def __init__(self, graph: RangedGraph, documents: Sequence[Document]) -> None:
        logits = graph.run([Call(np.array([document.tokens])) for document in documents])
        self._scored = ((document.tokens, one[0]) for document, one in zip(documents, logits, strict=True))

    def logits(self, token_ids: Sequence[int], /) -> Float32:
        """Of the next document with these tokens; those before it were scored by an earlier run."""
        return next(logits for tokens, logits in self._scored if tokens == tuple(token_ids))


class _Graph:
    """Which values pass from one part of a graph's nodes to the next."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self.inputs = {v.name: v for v in model.graph.input if v.name not in self.weights}
        constant = set(self.weights)
        self.nodes, self.makers = [], dict[str, onnx.NodeProto]()
        for node in model.graph.node:
            if _reads(node) <= constant:
                constant |= set(node.output)
                self.makers |= {name: node for name in node.output if name}
            else:
                self.nodes.append(node)

    def cut(self, limit: int) -> list[slice]:
        """Ranges of nodes, each with weights of at most `limit` bytes where normalizations allow it."""
        places = [i for i, node in enumerate(self.nodes) if "Normalization" in node.op_type]
        places = [*(places or range(1, len(self.nodes))), len(self.nodes)]
        ranges, start, last = [], 0, 0
        for place in places:
            if last > start and self._size(slice(start, place)) > limit:
                ranges.append(slice(start, last))
                start = last
            last = place
        return [*ranges, slice(start, len(self.nodes))]

    def carried(self, nodes: slice) -> list[str]:
        """What these nodes read of earlier ones."""
        return sorted(self._needed(nodes) - self.inputs.keys() - self.weights.keys() - self.makers.keys())

    def live(self, nodes: slice) -> list[str]:
        """What later nodes read of these."""
        later = {name for node in self.nodes[nodes.stop :] for name in _reads(node)}
        return sorted(_writes(self.nodes[nodes]) & later)

    def extract(self, nodes: slice, given: dict[str, NDArray]) -> onnx.ModelProto:
        """These nodes as a graph. given: a value of each input that is none of the whole graph's, for its type."""
        own = self.nodes[nodes]
        makers, weights = self._constants(self._needed(nodes))
        proto = onnx.ModelProto()
        proto.CopyFrom(self.model)
        graph, written = proto.graph, _writes(own)
        outputs = [value for value in self.model.graph.output if value.name in written]
        taken = {value.name for value in outputs}
        for part in (graph.node, graph.initializer, graph.input, graph.output, graph.value_info):
            del part[:]
        graph.node.extend([*makers, *own])
        graph.initializer.extend(self.weights[name] for name in weights)
        graph.input.extend(value for name, value in self.inputs.items() if name in self._needed(nodes))
        for name, value in given.items():
            kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
            graph.input.append(onnx.helper.make_tensor_value_info(name, kind, [None] * value.ndim))
        graph.output.extend(outputs)
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in self.live(nodes) if name not in taken)
        return proto

    def _needed(self, nodes: slice) -> set[str]:
        own = self.nodes[nodes]
        return {name for node in own for name in _reads(node)} - _writes(own)

    def _constants(self, names: set[str]) -> tuple[list[onnx.NodeProto], list[str]]:
        """Nodes, in order, and weights that make what of `names` follows from weights alone."""
        wanted, chosen = set(names), set[int]()
        order = [node for node in self.model.graph.node if node.output and node.output[0] in self.makers]
        for node in reversed(order):
            if wanted & set(node.output):
                chosen.add(id(node))
                wanted |= _reads(node)
        return [node for node in order if id(node) in chosen], [name for name in self.weights if name in wanted]

    def _size(self, nodes: slice) -> int:
        return sum(_nbytes(self.weights[name]) for name in self._constants(self._needed(nodes))[1])


def _reads(node: onnx.NodeProto) -> set[str]:
    """Names that a node reads, and those that graphs inside of it take from outside."""
    names = {name for name in node.input if name}
    for attribute in node.attribute:
        for graph in [attribute.g, *attribute.graphs]:
            inner = {name for part in graph.node for name in _reads(part)}
            names |= inner - _writes(graph.node) - {v.name for v in [*graph.input, *graph.initializer]}
    return names


def _writes(nodes: Sequence[onnx.NodeProto]) -> set[str]:
    return {name for node in nodes for name in node.output if name}


def _nbytes(tensor: onnx.TensorProto) -> int:
    width = 4 if tensor.data_type in FLOAT_TYPES else onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return width * math.prod(tensor.dims)


def _file(name: str) -> str:
    return f"{name.encode().hex()[-200:]}.npy"
