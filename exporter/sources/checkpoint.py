"""A transformers directory as a map from tensor names to places in files, from headers alone."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import InputRefused, lacking
from exporter.json_text import parse_json
from exporter.sources import safetensors_file, torch_file
from exporter.sources.own_files import require_own_files
from exporter.sources.tensors import TensorInfo

SAFETENSORS = "model.safetensors"
TORCH = "pytorch_model.bin"
JSON_LIMIT = 64 << 20
# Numbers that transformers loops over when it builds a model: each layer has a tensor of its own, and experts may share
# one. Without weights to show for them, a million would only take time and memory.
LAYERS = re.compile(r"(.*_)?(n|num|encoder|decoder)_(\w+_)?(layers?|blocks)")
EXPERTS, LABELS = re.compile(r"(.*_)?(n|num)_(\w+_)?experts"), re.compile("num_labels")
MANY_LAYERS, MANY_MODULES = 1000, 100_000


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`tensors` stand in the checkpoint's own order: file by file, each in the order of its header."""

    directory: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...]

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; InputRefused if it is missing, too large, or something else."""
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise InputRefused(f"{path} is larger than {JSON_LIMIT} bytes", expected="a configuration file")
        value = parse_json(path.read_bytes())
    except FileNotFoundError as error:
        raise InputRefused(
            f"{path.name} is missing in {path.parent}", expected="a model directory", todo="check the path"
        ) from error
    except (ValueError, OSError) as error:
        if system := lacking(error):
            raise system from error
        raise InputRefused(
            f"{path} is not JSON ({error})", expected="a JSON object", todo="fetch the file again"
        ) from error
    if not isinstance(value, dict):
        raise InputRefused(f"{path} holds a {type(value).__name__}", expected="a JSON object")
    return value


def weight_files(directory: Path) -> tuple[Path, ...]:
    """The weight files of `directory` that transformers reads: safetensors before `.bin`, a file before an index."""
    for single in (SAFETENSORS, TORCH):
        if (directory / single).is_file():
            return (directory / single,)
        index = directory / f"{single}.index.json"
        if index.is_file():
            return tuple(directory / name for name in _shard_names(index))
    raise InputRefused(
        f"no weights in {directory}",
        expected=f"{SAFETENSORS}, {TORCH}, or shards with an index",
        todo="check the path; a quantized bundle or an adapter is not a checkpoint",
    )


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read the configuration and every header. Raises InputRefused; no weight is read."""
    if not directory.is_dir():
        raise InputRefused(f"{directory} is not a directory", expected="a transformers model directory")
    require_own_files(directory)
    config = read_json(directory / "config.json")
    files = weight_files(directory)
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        if not file.is_file():
            raise InputRefused(
                f"the shard {file} is missing", expected="every file that the index names", todo="fetch it"
            )
        for name, info in read_headers(file).items():
            if name in tensors:
                raise InputRefused(
                    f"{name!r} stands in {tensors[name].file.name} and in {file.name}", expected="one place"
                )
            tensors[name] = info
    index = _index_path(directory, files[0].suffix)
    if index.is_file() and files[0].name not in (SAFETENSORS, TORCH):
        _check_index(index, tensors)
    check_counts(directory / "config.json", config, len(tensors))
    return Checkpoint(directory, config, tensors, files)


def check_counts(path: Path | str, config: Mapping[str, Any], tensors: int) -> None:
    """Refuse a configuration of more layers, experts or labels than the weights can have."""
    counts = dict.fromkeys((LAYERS, EXPERTS, LABELS), 1)
    parts: list[Mapping[str, Any]] = [config]
    while parts:
        part = parts.pop()
        parts += [value for value in part.values() if isinstance(value, dict)]
        for key, value in part.items():
            for kind in counts:
                if isinstance(value, int) and kind.fullmatch(key):
                    counts[kind] = max(counts[kind], value)
    layers, experts, labels = counts.values()
    if layers > max(MANY_LAYERS, tensors) or max(layers * experts, labels) > MANY_MODULES + tensors:
        raise InputRefused(
            f"{path} describes {str(layers)[:40]} layers, {str(experts)[:40]} experts, {str(labels)[:40]} labels",
            expected=f"what {tensors} tensors can hold",
            todo="check that config.json and the weights belong together",
        )


def read_headers(file: Path) -> dict[str, TensorInfo]:
    """Tensors of one weight file by name."""
    if file.suffix == ".safetensors":
        return safetensors_file.read_header(file)[0]
    return torch_file.read_header(file)


def _index_path(directory: Path, suffix: str) -> Path:
    return directory / f"{SAFETENSORS if suffix == '.safetensors' else TORCH}.index.json"


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputRefused(f"{index} has no weight_map", expected="a map from tensor names to files")
    for file in weight_map.values():
        if not isinstance(file, str) or not _is_file_name(file):
            raise InputRefused(
                f"{index} names the file {str(file)[:120]!r}", expected="file names inside the directory"
            )
    return weight_map


def _is_file_name(text: str) -> bool:
    """True for what may be the name of a file in a directory, and nothing elsewhere."""
    try:
        length = len(text.encode())
    except UnicodeEncodeError:  # half a surrogate pair
        return False
    return length < 256 and "\0" not in text and Path(text).name == text and text not in ("", ".", "..")


def _shard_names(index: Path) -> list[str]:
    return sorted(set(_weight_map(index).values()))


def _check_index(index: Path, tensors: Mapping[str, TensorInfo]) -> None:
    for name, file in _weight_map(index).items():
        if name not in tensors or tensors[name].file.name != file:
            raise InputRefused(
                f"{index.name} places {name!r} in {file}, which does not hold it", expected="a true index"
            )
