"""An ONNX bundle as verify sees it: files hashed against its manifest, and the weights that its graph points at."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from numpy.typing import NDArray

from exporter.errors import InputRefused
from exporter.files import sha256_file
from exporter.graph.bundle import Bundle as GraphBundle
from exporter.graph.bundle import bundles_in
from exporter.graph.dequantize import float_values, unpack
from exporter.graph.graph_check import NOT_OURS, NOT_TRACED, load_graph, require_our_operators
from exporter.graph.weights import Quantized, Weight, open_weights
from exporter.manifest import MANIFEST, file_is_unchanged, read_manifest
from exporter.merging.plan import DTYPES as MERGE_DTYPES
from exporter.parity.int8_base import Onto
from exporter.progress import SILENT, Progress
from exporter.runtime.session import cuda_is_usable
from exporter.sources.checkpoint import SAFETENSORS, TORCH, weight_files
from exporter.sources.own_files import require_own_files
from exporter.sources.tensors import TensorInfo
from exporter.sources.values import read_tensor

CONFIG = "config.json"
GRAPHS = ("model.onnx", "model_cuda.onnx")


@dataclass(frozen=True, slots=True)
class SeparateAdapter:
    """An adapter beside a bundle's weights. `exported`: the bundle as its export wrote it; factors by input name."""

    name: str
    exported: GraphBundle
    factors: Mapping[str, NDArray]


@dataclass(frozen=True, slots=True)
class Bundle:
    """`format` is float, int8 or int4, by what the graph computes with; `hashes` are of the bytes as read now."""

    directory: Path
    graph: Path
    format: str
    target: str
    provenance: str
    hashes: dict[str, str]
    weights: Mapping[str, Weight]
    others: tuple[str, ...] = ()  # graphs beside this one that cannot run here
    onto: Onto = "original"  # what the manifest says that the adapter was merged onto
    merge_dtype: str | None = None  # that the manifest says the merge rounded to, where it is not the base's own type
    is_traced: bool = False  # by optimum, as the manifest says: it copies its cache at each call
    adapter: SeparateAdapter | None = None  # chosen at run time; the weights here are those with it

    @property
    def content(self) -> str:
        """A digest of everything that its logits depend on."""
        files = self.hashes | {CONFIG: sha256_file(self.directory / CONFIG)}
        facts = [self.graph.name, self.target, self.adapter.name if self.adapter else None, files]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def model(self) -> onnx.ModelProto:
        """The graph without its weights; an adapter's factors are the defaults of its inputs."""
        model, factors = load_graph(self.graph), self.adapter.factors if self.adapter else {}
        for initializer in model.graph.initializer:
            if initializer.name in factors:
                initializer.CopyFrom(onnx.numpy_helper.from_array(factors[initializer.name], initializer.name))
        return model

    def values(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every floating-point tensor by its checkpoint name, in float32 and the checkpoint's orientation."""
        return float_values(self.weights)


def open_bundles(directory: Path, progress: Progress = SILENT) -> list[Bundle]:
    """A bundle for each graph in `directory`, cpu first; every file that is listed or read is hashed, once.

    A graph for cuda beside one for cpu is left out where no CUDA provider is: the first then bears its name.
    InputRefused: no graph, a hash that differs from the manifest, a graph that points at anything but whole tensors.
    """
    if not directory.is_dir():
        raise InputRefused(f"{directory} is not a directory", expected="a bundle made by `exporter export`")
    require_own_files(directory)
    graphs = [directory / name for name in GRAPHS if (directory / name).is_file()]
    if not graphs:
        raise InputRefused(
            f"no ONNX graph in {directory}",
            expected=" or ".join(GRAPHS),
            todo="run `exporter export` on this checkpoint",
        )
    models = {graph: load_graph(graph) for graph in graphs}
    first, *beside = graphs
    left = [graph for graph in beside if _target(models[graph]) == "cuda" and not cuda_is_usable()]
    taken = [graph for graph in graphs if graph not in left]
    traced = {one.graph for one in bundles_in(directory) if one.precision == "optimum"}
    weights = {}
    for graph in taken:
        weights[graph] = _graph_weights(graph, models[graph])
        require_our_operators(graph, models[graph], NOT_TRACED if graph in traced else NOT_OURS)
    files = {graph: [graph, *weights[graph][1]] for graph in taken}
    _require_one_model(directory, [path for read in files.values() for path in read])
    hashes, hashed = _check_hashes(directory, sorted({path for read in files.values() for path in read}), progress)
    return [
        Bundle(
            directory,
            graph,
            _format(models[graph]),
            _target(models[graph]),
            "known" if hashed.issuperset(files[graph]) else "unknown",
            hashes,
            weights[graph][0],
            tuple(path.name for path in left) if graph == first else (),
            merged_onto(directory),
            merge_dtype(directory),
            graph in traced,
        )
        for graph in taken
    ]


def _require_one_model(directory: Path, read: list[Path]) -> None:
    """InputRefused where transformers would load other weights from `directory` than its graphs read."""
    if not any((directory / f"{name}{end}").exists() for name in (SAFETENSORS, TORCH) for end in ("", ".index.json")):
        return
    if stray := [path.name for path in weight_files(directory) if path not in read]:
        raise InputRefused(
            f"{directory} holds {stray[0]}, which transformers loads and no graph here reads",
            expected="one model in a directory",
            todo="remove it, or export the checkpoint again",
        )


def merged_onto(directory: Path) -> Onto:
    """What the merge was asked to add to, by the manifest of the checkpoint or of an export of it; else "original"."""
    stages = (read_manifest(directory) or {"stages": {}})["stages"]
    request = stages.get("merge", {}).get("request")
    found: set[Any] = {str(section["onto"]) for section in stages.values() if "onto" in section}
    if isinstance(request, dict) and "onto" in request:
        found.add(str(request["onto"]))
    if len(found) > 1 or not all(onto in ("original", "int8") for onto in found):
        raise InputRefused(
            f"{directory / MANIFEST} says that the adapter was merged onto {sorted(map(str, found))}",
            expected='one of "original" and "int8"',
            todo="merge and export it again",
        )
    return found.pop() if found else "original"


def merge_dtype(directory: Path) -> str | None:
    """The type (safetensors name) that the merge was asked for, by the manifest; None for the base's own."""
    stages = (read_manifest(directory) or {"stages": {}})["stages"]
    request = stages.get("merge", {}).get("request")
    found: set[Any] = {str(section["merge_dtype"]) for section in stages.values() if "merge_dtype" in section}
    if isinstance(request, dict) and "dtype" in request:
        found.add(str(request["dtype"]))
    if len(found) > 1 or not found <= {"auto", *MERGE_DTYPES}:
        raise InputRefused(
            f"{directory / MANIFEST} says that the merge rounded to {sorted(found)}",
            expected="one of auto, " + ", ".join(MERGE_DTYPES),
            todo="merge and export it again",
        )
    return MERGE_DTYPES.get(found.pop()) if found else None


def external_data(tensor: onnx.TensorProto) -> dict[str, str]:
    """location, offset and length of a tensor that lies in another file; empty for one inside the graph."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return {}
    return {entry.key: entry.value for entry in tensor.external_data}


def _graph_weights(graph: Path, model: onnx.ModelProto) -> tuple[dict[str, Weight], list[Path]]:
    """The tensors of the files that the graph reads, after checking that each initializer is one of them."""
    external = [(tensor.name, external_data(tensor)) for tensor in model.graph.initializer if external_data(tensor)]
    if not external:
        raise InputRefused(f"{graph} points at no weights", expected="initializers in a safetensors file")
    files, weights = [], {}
    for location in sorted({entry["location"] for _, entry in external}):
        path = graph.parent / location
        if Path(location).name != location or not path.is_file():
            raise InputRefused(f"{graph.name} reads {location!r}", expected=f"a file in {graph.parent}")
        if path.suffix != ".safetensors":
            raise InputRefused(
                f"{graph.name} reads its weights from {location}",
                expected="safetensors, whose header says which bytes are which tensor",
                todo="export it again",
            )
        files.append(path)
        weights |= open_weights(path)
    _check_places(graph, external, weights)
    return weights, files


def _check_places(graph: Path, external: list[tuple[str, dict[str, str]]], weights: Mapping[str, Weight]) -> None:
    """Each initializer must be one whole tensor, and one of the name it bears: swapped offsets are another model."""
    places = {
        (info.file.name, info.offset): (info, name) for name, weight in weights.items() for info in _parts(weight)
    }
    for name, entry in external:
        found = places.get((entry["location"], int(entry.get("offset", 0))))
        if found is None or int(entry.get("length", -1)) != found[0].nbytes:
            raise InputRefused(
                f"the initializer {name!r} of {graph.name} points at bytes that are no tensor of {entry['location']}",
                expected="the place of one whole tensor",
                todo="export it again: the weights were replaced after the graph was written",
            )
        if not name.startswith(found[1]):
            raise InputRefused(
                f"the initializer {name!r} of {graph.name} points at the tensor {found[1]!r}",
                expected="the tensor that it is named for",
                todo="export it again",
            )


def _parts(weight: Weight) -> list[TensorInfo]:
    if isinstance(weight, Quantized):
        return list(weight.parts)
    return [weight]


def _check_hashes(directory: Path, read: list[Path], progress: Progress) -> tuple[dict[str, str], set[Path]]:
    """Digests of every file that the manifest lists or a graph reads, and those files whose digest it records."""
    manifest = read_manifest(directory)
    expected = listed_files(manifest) if manifest else {}
    paths = sorted({*(directory / name for name in expected), *read})
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise InputRefused(
            f"{directory} lacks {', '.join(missing)}",
            expected="every file that exporter.json lists",
            todo="make it again",
        )
    hashes: dict[Path, str] = {}
    with progress.task(f"hash {directory.name}", sum(path.stat().st_size for path in paths), "B") as task:
        for path in paths:
            hashes[path] = sha256_file(path)
            task.advance(path.stat().st_size)
    for name, entry in expected.items():
        recorded = entry.get("sha256")
        if recorded is None and file_is_unchanged(directory / name, entry):  # too large to be read by its export
            continue
        if hashes[directory / name] != recorded:
            raise InputRefused(
                f"{directory / name} has the SHA-256 {hashes[directory / name][:16]}...",
                expected=f"{recorded[:16]}..., as exporter.json records" if recorded else "the file that was exported",
                todo="the file was changed after it was made: make it again",
            )
    known = {directory / name for name, entry in expected.items() if entry.get("sha256") is not None}
    return {str(path.relative_to(directory)): digest for path, digest in hashes.items()}, known.intersection(read)


def listed_files(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The files that a manifest's stages list as output, with their entries; a later stage's entry counts."""
    files: dict[str, dict[str, Any]] = {}
    for section in manifest["stages"].values():
        listed = section.get("files", {}) if isinstance(section, dict) else {}
        for name, entry in listed.items():
            if (
                not isinstance(entry, dict)
                or "sha256" not in entry
                or Path(name).is_absolute()
                or ".." in Path(name).parts
            ):
                raise InputRefused(
                    f"exporter.json lists {name!r} in a way this version does not read", todo="make it again"
                )
            files[name] = entry
    return files


def _format(model: onnx.ModelProto) -> str:
    bits = {
        attribute.i
        for node in model.graph.node
        if node.op_type == "MatMulNBits"
        for attribute in node.attribute
        if attribute.name == "bits"
    }
    return f"int{min(bits)}" if bits else "float"


def _target(model: onnx.ModelProto) -> str:
    """cuda graphs keep their cache in float16."""
    halves = [value for value in model.graph.input if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16]
    return "cuda" if halves else "cpu"


def quantization_steps(weight: Quantized) -> tuple[torch.Tensor, torch.Tensor]:
    """(step, clipped) of every element in the checkpoint's orientation: float32, and whether its code is an end.

    Both lie in memory as they are read: whoever takes a few rows of a transposed view reads a line for each number.
    """
    scales = read_tensor(weight.scales).float().abs()  # a scale may be negative
    codes = unpack(read_tensor(weight.codes), weight.bits).flatten(1)
    clipped = ((codes == 0) | (codes == (1 << weight.bits) - 1))[:, : weight.columns]
    if weight.transposed:
        return scales.T.repeat_interleave(weight.block, dim=0)[: weight.columns], clipped.T.contiguous()
    return scales.repeat_interleave(weight.block, dim=1)[:, : weight.columns], clipped
