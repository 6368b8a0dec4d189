"""The bundle's graph opened directly, so that it can be fed as optimum and genai feed it, and changed in memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from exporter.errors import InputRefused
from exporter.runtime.session import PROVIDERS, require_provider

MICROSOFT = "com.microsoft"
FATAL_ONLY = 4
Cache = list[NDArray]  # key and value of each layer, (B, heads, past, head size)


@dataclass(frozen=True, slots=True)
class Fed:
    """One call: logits float32 (B, S, V) and the cache that came out."""

    logits: NDArray[np.float32]
    cache: Cache


class GraphSession:
    """An ONNX Runtime session over a graph in memory and the weights in `directory`; the cache is fed and returned."""

    def __init__(self, model: onnx.ModelProto, directory: Path, target: str) -> None:
        require_provider(target)
        options = ort.SessionOptions()
        options.log_severity_level = FATAL_ONLY
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(directory.resolve())
        )
        providers = list(dict.fromkeys([PROVIDERS[target], PROVIDERS["cpu"]]))
        try:
            self._session = ort.InferenceSession(model.SerializeToString(), options, providers=providers)
        except Exception as error:  # onnxruntime's own exceptions have no common base
            raise InputRefused(
                f"ONNX Runtime cannot open the graph in {directory}: {str(error).splitlines()[0][:300]}",
                expected="a graph as exporter wrote it",
                todo="export again",
            ) from error
        self._past = [value for value in self._session.get_inputs() if value.name.startswith("past_key_values.")]
        self._half = bool(self._past) and self._past[0].type == "tensor(float16)"

    def logits(self, token_ids: Sequence[int], /) -> NDArray[np.float32]:
        """float32 (T, V) of one unpadded row: a Scorer."""
        return self.feed(np.array([list(token_ids)])).logits[0]

    def feed(
        self,
        ids: NDArray,
        *,
        mask: NDArray | None = None,
        positions: NDArray | None = None,
        cache: Cache | None = None,
    ) -> Fed:
        """`ids` (B, S) after `cache`; mask (B, past + S), positions (B, S) default to those of unpadded rows."""
        rows, length = ids.shape
        past = cache[0].shape[2] if cache else 0
        feeds = {
            "input_ids": ids.astype(np.int64),
            "attention_mask": np.ones((rows, past + length), np.int64) if mask is None else mask.astype(np.int64),
            "position_ids": np.tile(np.arange(past, past + length), (rows, 1)) if positions is None else positions,
        }
        feeds["position_ids"] = feeds["position_ids"].astype(np.int64)
        dtype = np.float16 if self._half else np.float32
        for i, value in enumerate(self._past):
            empty = np.zeros((rows, value.shape[1], 0, value.shape[3]), dtype)
            feeds[value.name] = cache[i] if cache else empty
        outputs = ["logits", *(value.name.replace("past_key_values", "present") for value in self._past)]
        logits, *present = self._session.run(outputs, feeds)
        return Fed(np.asarray(logits, np.float32), [np.asarray(array) for array in present])


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
    """The sibling GELU (erf for tanh, tanh for erf), SiLU for QuickGELU, GELU for ReLU. None without an activation."""
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
    addend = np.zeros(vocabulary, np.float32)
    addend[0] = np.nan
    for node in changed.graph.node:
        for i, output in enumerate(node.output):
            if output == "logits":
                node.output[i] = "logits.before_nan"
    changed.graph.initializer.append(onnx.numpy_helper.from_array(addend, "nan_addend"))
    changed.graph.node.append(onnx.helper.make_node("Add", ["logits.before_nan", "nan_addend"], ["logits"]))
    return changed
