"""The safetensors header, checked as its specification says, without reading a value."""

import math
from pathlib import Path
from typing import Any

from exporter.errors import EnvironmentLacking, InputRefused
from exporter.json_text import parse_json
from exporter.sources.tensors import ITEM_SIZES, TensorInfo, item_size

# The format's own limit: https://github.com/huggingface/safetensors, "Format"
MAX_HEADER = 100_000_000
MAX_DIMENSIONS = 64  # torch's own limit, and what keeps a product of sizes short


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors by name, in file order, and the metadata. Raises InputRefused for anything the format forbids."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(MAX_HEADER, size - 8) or length < 2:
                raise _malformed(path, f"{size} bytes long with a header of {length}", "a header that fits in the file")
            raw = file.read(length)
    except OSError as error:
        raise EnvironmentLacking(
            f"{path} cannot be read: {error.strerror}", todo="check the path and the disk"
        ) from error
    try:
        header = parse_json(raw, object_pairs_hook=_no_duplicates)
    except ValueError as error:
        raise _malformed(path, f"a header that is not JSON ({error})", "a JSON object") from error
    if not isinstance(header, dict) or raw[:1] != b"{":
        raise _malformed(path, "a header that is not an object", 'a JSON object that begins with "{"')
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _malformed(path, "__metadata__ with values that are not strings", "a map of strings")
    start = 8 + length
    tensors = {name: _tensor(path, name, entry, start) for name, entry in header.items()}
    _check_contiguous(path, tensors, start, size)
    return tensors, metadata


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands twice")
    return result


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _tensor(path: Path, name: str, entry: object, start: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _malformed(path, f"tensor {name!r} without dtype, shape and data_offsets", "these three and no more")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise _malformed(path, f"tensor {name!r} of type {str(dtype)[:40]!r}", "one of " + ", ".join(ITEM_SIZES))
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_count, shape)):
        raise _malformed(path, f"tensor {name!r} with shape {str(shape)[:80]}", "a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise _malformed(path, f"tensor {name!r} with data_offsets {str(offsets)[:80]}", "[begin, end]")
    begin, end = offsets
    if math.prod(max(1, length) for length in shape) >= 1 << 62:
        raise _malformed(path, f"tensor {name!r} with shape {str(shape)[:80]}", "a shape that a tensor can have")
    nbytes = math.prod(shape) * item_size(dtype)
    if end - begin != nbytes:
        raise _malformed(path, f"tensor {name!r} of {end - begin} bytes", f"{nbytes} for {dtype} {shape}")
    return TensorInfo(name, dtype, tuple(shape), path, start + begin, nbytes)


def _check_contiguous(path: Path, tensors: dict[str, TensorInfo], start: int, size: int) -> None:
    at = start
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != at:
            raise _malformed(path, f"a hole or an overlap before tensor {info.name!r}", "tensors without gaps")
        at += info.nbytes
    if at != size:
        raise _malformed(path, f"{size} bytes long", f"{at} bytes, as its header says")


def _malformed(path: Path, seen: str, expected: str) -> InputRefused:
    return InputRefused(f"{path} is malformed: {seen}", expected=expected, todo="fetch or copy the file again")
