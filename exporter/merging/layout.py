"""Where each tensor of a shard stands, so that an ONNX graph can point at aligned weights in a legal safetensors file.

The format forbids holes between tensors and bytes after the last one. So the JSON header is padded with spaces until
the data starts at a multiple of 4096, and tensors whose size is a multiple of 4096 come first.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from exporter.sources.tensors import item_size

ALIGNMENT = 4096


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor to write: its name, safetensors type, shape and size in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """`header` is the file's beginning, length prefix included; `offsets` are absolute; `size` is the whole file's."""

    header: bytes
    order: tuple[str, ...]
    offsets: dict[str, int]
    size: int


def lay_out(slots: Iterable[Slot]) -> ShardLayout:
    """Order and offsets of one safetensors file, and its header with the metadata save_pretrained writes."""
    order = sorted(slots, key=_save_order)
    aligned = [slot for slot in order if slot.nbytes % ALIGNMENT == 0]
    rest = [slot for slot in order if slot.nbytes % ALIGNMENT]
    if rest:
        largest = max(rest, key=lambda slot: slot.nbytes)
        rest = [largest, *(slot for slot in rest if slot is not largest)]
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    relative: dict[str, int] = {}
    at = 0
    for slot in [*aligned, *rest]:
        relative[slot.name] = at
        entries[slot.name] = {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": [at, at + slot.nbytes]}
        at += slot.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    length = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT - 8
    header = length.to_bytes(8, "little") + text.ljust(length)
    start = len(header)
    return ShardLayout(header, tuple(relative), {name: start + at for name, at in relative.items()}, start + at)


def _save_order(slot: Slot) -> tuple[int, str]:
    return -item_size(slot.dtype), slot.name


def unaligned(layouts: Sequence[ShardLayout]) -> list[str]:
    """Tensors of a page or more that start elsewhere than at a multiple of 4096."""
    found = []
    for layout in layouts:
        ends = [*(layout.offsets[name] for name in layout.order[1:]), layout.size]
        for name, end in zip(layout.order, ends, strict=True):
            start = layout.offsets[name]
            if start % ALIGNMENT and end - start >= ALIGNMENT:
                found.append(name)
    return found
