"""Checkpoints written block by block: safetensors, or the `.bin` of 2023, sharded as save_pretrained shards."""

import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

import torch
from torch._utils import _rebuild_tensor_v2

Format = Literal["safetensors", "bin"]
NAMES = {torch.float16: "F16", torch.float32: "F32", torch.uint8: "U8"}
STORAGES = {torch.float16: torch.HalfStorage, torch.float32: torch.FloatStorage, torch.uint8: torch.ByteStorage}
ALIGNMENT = 64  # of each storage in a `.bin`, as torch.save aligns them
LOCAL_HEADER, ZIP64_FIELD, FIELD_HEADER = 30, 20, 4


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor to write. `blocks` makes its values again at each call: runs of whole elements, in row-major order."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[torch.Tensor]]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def bytes_blocks(self) -> Iterator[memoryview]:
        """The tensor's bytes. RuntimeError if the blocks are not the size that the plan says."""
        left = self.nbytes
        for block in self.blocks():
            data = block.to(self.dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data
            left -= len(data)
            yield data
        if left:
            raise RuntimeError(f"the blocks of {self.name} miss its size by {left} bytes")


def write_checkpoint(directory: Path, tensors: Sequence[Planned], format: Format, shard_size: int) -> int:
    """Write the weights of a model, with an index if there is more than one file. Returns the number of files."""
    shards = split(tensors, shard_size)
    stem, suffix, single = ("model", "safetensors", "model.safetensors")
    if format == "bin":
        stem, suffix, single = ("pytorch_model", "bin", "pytorch_model.bin")
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}" if len(shards) > 1 else single
        write_file(directory / name, shard, format)
        weight_map |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)}, "weight_map": weight_map}
        (directory / f"{single}.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return len(shards)


def split(tensors: Iterable[Planned], shard_size: int) -> list[list[Planned]]:
    """Shards in the order of the tensors: a new one begins where the next tensor would exceed `shard_size`."""
    shards: list[list[Planned]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def write_file(path: Path, tensors: Sequence[Planned], format: Format) -> None:
    """Write one weight file."""
    if format == "bin":
        _write_torch(path, tensors)
    else:
        _write_safetensors(path, tensors)


def _write_safetensors(path: Path, tensors: Sequence[Planned]) -> None:
    order = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in order:
        entries[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in order:
            for block in tensor.bytes_blocks():
                file.write(block)


def _write_torch(path: Path, tensors: Sequence[Planned]) -> None:
    """The zip that torch.save writes: the state dict's pickle, then each storage, uncompressed and aligned."""
    with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), state_pickle(tensors))
        for key, tensor in enumerate(tensors):
            entry = zipfile.ZipInfo(f"archive/data/{key}")
            start = file.tell() + LOCAL_HEADER + len(entry.filename) + ZIP64_FIELD + FIELD_HEADER
            padding = -start % ALIGNMENT
            entry.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
            with archive.open(entry, "w", force_zip64=True) as storage:
                for block in tensor.bytes_blocks():
                    storage.write(block)
        archive.writestr(zipfile.ZipInfo("archive/version"), b"3\n")


@dataclass(frozen=True, slots=True)
class _Storage:
    key: int
    tensor: Planned


@dataclass(frozen=True, slots=True)
class _Rebuilt:
    """Pickles as torch pickles a tensor, without holding its values."""

    storage: _Storage

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        shape = self.storage.tensor.shape
        strides = tuple(torch.Size(shape[axis + 1 :]).numel() for axis in range(len(shape)))
        return _rebuild_tensor_v2, (self.storage, 0, shape, strides, False, OrderedDict())


class _StatePickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> object:
        if not isinstance(obj, _Storage):
            return None
        return "storage", STORAGES[obj.tensor.dtype], str(obj.key), "cpu", obj.tensor.numel


def state_pickle(tensors: Sequence[Planned]) -> bytes:
    """The pickle of a state dict whose storages are named 0, 1, ..."""
    data = BytesIO()
    _StatePickler(data, 2).dump({tensor.name: _Rebuilt(_Storage(i, tensor)) for i, tensor in enumerate(tensors)})
    return data.getvalue()
