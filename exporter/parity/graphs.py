"""The bundle's graph opened directly, so that it can be fed as optimum and genai feed it, and changed in memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from exporter.runtime.session import FATAL_ONLY, new_session, require_provider

MICROSOFT = "com.microsoft"
Cache = list[NDArray]  # key and value of each layer, (B, heads, past, head size)


@dataclass(frozen=True, slots=True)
class Fed:
    """One call: logits float32 (B, S, V) and the cache that came out."""

    logits: NDArray[np.float32]
    cache: Cache


@dataclass(frozen=True, slots=True)
class Call:
    """Feeds of one call: `ids` (B, S) after `past` tokens, whose cache is that of the call numbered `after`.

    mask (B, past + S) and positions (B, S) default to those of unpadded rows. is_stale: a mutant, in which the newest
    slot of that cache still holds what the slot before it holds.
    """

    ids: NDArray
    mask: NDArray | None = None
    positions: NDArray | None = None
    past: int = 0
    after: int | None = None
    is_stale: bool = False


class Graph(Protocol):
    """A graph in memory, or one that runs range by range."""

    def logits(self, token_ids: Sequence[int], /) -> NDArray[np.float32]:
        """float32 (T, V) of one unpadded row."""
        ...

    def run(self, calls: Sequence[Call]) -> Iterator[NDArray[np.float32]]:
        """The logits (B, S, V) of each call, in order."""
        ...


class GraphSession:
    """An ONNX Runtime session over a graph in memory and the weights in `directory`; the cache is fed and returned."""

    def __init__(self, model: onnx.ModelProto, directory: Path, target: str) -> None:
        self._session = open_graph(model, directory, target)
        self._past = [value for value in self._session.get_inputs() if value.name.startswith("past_key_values.")]
        self._taken = {value.name for value in self._session.get_inputs()}

    def logits(self, token_ids: Sequence[int], /) -> NDArray[np.float32]:
        """float32 (T, V) of one unpadded row: a Scorer."""
        return self.feed(np.array([list(token_ids)])).logits[0]

    def run(self, calls: Sequence[Call]) -> Iterator[NDArray[np.float32]]:
        """The logits (B, S, V) of each call, in order."""
        followed, caches = {call.after for call in calls}, dict[int | None, Cache]()
        for index, call in enumerate(calls):
            fed = self._fed(call, caches.get(call.after, []))
            if index in followed:
                caches[index] = fed.cache
            yield fed.logits

    def feed(
        self, ids: NDArray, *, mask: NDArray | None = None, positions: NDArray | None = None, cache: Cache | None = None
    ) -> Fed:
        """`ids` (B, S) after `cache`; mask (B, past + S), positions (B, S) default to those of unpadded rows."""
        return self._fed(Call(ids, mask, positions, cache[0].shape[2] if cache else 0), cache or [])

    def values(self, names: Sequence[str], token_ids: Sequence[int]) -> dict[str, NDArray]:
        """The named outputs for one unpadded row, of those that are floats numpy has a type for: not bfloat16."""
        types = {output.name: output.type for output in self._session.get_outputs()}
        floats = [name for name in names if types[name] in ("tensor(float)", "tensor(float16)")]
        found = self._session.run(floats, self._feeds(Call(np.array([list(token_ids)])), []))
        return {name: np.asarray(value) for name, value in zip(floats, found, strict=True)}

    def _fed(self, call: Call, cache: Cache) -> Fed:
        outputs = ["logits", *(present_name(value.name) for value in self._past)]
        logits, *present = self._session.run(outputs, self._feeds(call, cache))
        return Fed(np.asarray(logits, np.float32), [np.asarray(array) for array in present])

    def _feeds(self, call: Call, cache: Cache) -> dict[str, NDArray]:
        """Without what the graph does not take: one that was traced may find the positions itself."""
        return {k: v for k, v in feeds_of(call, self._past, cache).items() if k in self._taken}


def open_graph(model: onnx.ModelProto, directory: Path, target: str) -> ort.InferenceSession:
    """A session over a graph in memory and the weights in `directory`; InputRefused where ONNX Runtime refuses it."""
    require_provider(target)
    options = ort.SessionOptions()
    options.log_severity_level = FATAL_ONLY
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(directory.resolve()))
    return new_session(model.SerializeToString(), options, target, f"the graph in {directory}")


def present_name(past: str) -> str:
    """The output that continues the input `past_key_values.0.key`."""
    return past.replace("past_key_values", "present")


def feeds_of(call: Call, past: Sequence[Any], cache: Cache) -> dict[str, NDArray]:
    """What a session takes for `call`. past: its cache inputs, filled with `cache` in their order, or empty."""
    rows, length = call.ids.shape
    total = call.past + length
    positions = np.tile(np.arange(call.past, total), (rows, 1)) if call.positions is None else call.positions
    mask = np.ones((rows, total), np.int64) if call.mask is None else call.mask
    feeds = {
        "input_ids": call.ids.astype(np.int64),
        "attention_mask": mask.astype(np.int64),
        "position_ids": positions.astype(np.int64),
    }
    for i, value in enumerate(past):
        dtype = np.float16 if value.type == "tensor(float16)" else np.float32
        given = cache[i] if cache else np.zeros((rows, value.shape[1], 0, value.shape[3]), dtype)
        feeds[value.name] = _stale(given) if call.is_stale else given
    return feeds


def _stale(cache: NDArray) -> NDArray:
    """The newest slot still holds what the slot before it holds."""
    changed = cache.copy()
    changed[:, :, -1] = cache[:, :, -2] if cache.shape[2] > 1 else 0
    return changed


def full_precision(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with every MatMulNBits computing in float32 (accuracy_level 1): is the graph itself right?"""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for node in changed.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = 1
    return changed


def wrong_activation(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """The sibling GELU (erf for tanh, tanh for erf), SiLU for QuickGELU, GELU for ReLU. None without an activation.

    In a traced graph an activation stands in its parts: x sigmoid(x) becomes x sigmoid(1.702 x), erf and tanh change
    places, scaled to one slope at 0.
    """
    siblings = {"BiasGelu": "FastGelu", "FastGelu": "BiasGelu", "Gelu": "FastGelu"}
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    found = False
    for node in changed.graph.node:
        if node.op_type in siblings:
            node.op_type, node.domain = siblings[node.op_type], MICROSOFT
            found = True
        elif node.op_type == "Relu":
            node.op_type, node.domain = "Gelu", MICROSOFT
            found = True
        elif node.op_type == "QuickGelu":
            for attribute in node.attribute:
                if attribute.name == "alpha":
                    attribute.f = 1.0 if abs(attribute.f - 1.702) < 1e-3 else 1.702
                    found = True
    return changed if found else _wrong_part(changed)


def _wrong_part(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """`model` with another function in the middle of every activation; None where there is no such function."""
    slope = 2 / np.sqrt(np.pi)  # of erf at 0
    siblings = {"Sigmoid": ("Sigmoid", 1.702), "Erf": ("Tanh", slope), "Tanh": ("Erf", 1 / slope)}
    nodes, found = list[onnx.NodeProto](), False
    for node in model.graph.node:
        if node.op_type in siblings:
            found, name = True, f"{node.output[0]}.scaled"
            node.op_type, scale = siblings[node.op_type]
            factor = onnx.numpy_helper.from_array(np.array(scale, np.float32), f"{name}.factor")
            model.graph.initializer.append(factor)
            nodes.append(onnx.helper.make_node("Mul", [node.input[0], factor.name], [name]))
            node.input[0] = name
        nodes.append(node)
    if found:
        del model.graph.node[:]
        model.graph.node.extend(nodes)
    return model if found else None


def relu_activation(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """ReLU for any GELU, GELU for ReLU: float16 cannot tell one GELU from another. None without an activation."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    nodes, found = [], False
    for node in changed.graph.node:
        if node.op_type in ("BiasGelu", "FastGelu", "Gelu", "QuickGelu"):
            found, given = True, node.input[0]
            if len(node.input) > 1 and node.input[1]:
                given = f"{node.output[0]}.biased"
                nodes.append(onnx.helper.make_node("Add", list(node.input[:2]), [given]))
            nodes.append(onnx.helper.make_node("Relu", [given], list(node.output)))
            continue
        if node.op_type == "Relu":
            found, node.op_type, node.domain = True, "Gelu", MICROSOFT
        nodes.append(node)
    del changed.graph.node[:]
    changed.graph.node.extend(nodes)
    return changed if found else None


def wrong_qkv_order(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """Packed attention inputs read as k|q|v. None where the graph packs nothing."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    nodes, found = [], False
    for node in changed.graph.node:
        packed = node.op_type == "GroupQueryAttention" and len(node.input) > 1 and not node.input[1]
        if packed:
            found, name = True, node.input[0]
            parts = [f"{name}.{part}" for part in "qkv"]
            nodes.append(onnx.helper.make_node("Split", [name], parts, axis=-1, num_outputs=3))
            nodes.append(onnx.helper.make_node("Concat", [parts[1], parts[0], parts[2]], [f"{name}.kqv"], axis=-1))
            node.input[0] = f"{name}.kqv"
        nodes.append(node)
    del changed.graph.node[:]
    changed.graph.node.extend(nodes)
    return changed if found else None


def not_a_number(model: onnx.ModelProto) -> onnx.ModelProto:
    """One NaN in the logits of every position, as an overflow in a half-precision head would give."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    vocabulary = (
        next(value for value in changed.graph.output if value.name == "logits").type.tensor_type.shape.dim[2].dim_value
    )
    addend = np.zeros(max(1, vocabulary), np.float32)  # every logit, where the graph does not say how many
    addend[0] = np.nan
    for node in changed.graph.node:
        for i, output in enumerate(node.output):
            if output == "logits":
                node.output[i] = "logits.before_nan"
    changed.graph.initializer.append(onnx.numpy_helper.from_array(addend, "nan_addend"))
    changed.graph.node.append(onnx.helper.make_node("Add", ["logits.before_nan", "nan_addend"], ["logits"]))
    return changed
