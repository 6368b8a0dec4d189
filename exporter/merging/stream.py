"""Write one shard of a plan: untouched bytes as they are, changed tensors in blocks of rows, a digest of each."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from exporter.errors import EnvironmentLacking, InputRefused
from exporter.merging.blocks import BLOCK, BlockWriter
from exporter.merging.changes import LowRank, PeftLayer
from exporter.merging.delta import BLOCK_ELEMENTS, Update, prepare, prepare_int8, row_blocks
from exporter.merging.layout import ShardLayout
from exporter.merging.modules import ModelLayout
from exporter.merging.output import OutputTensor
from exporter.merging.tuners import prepare_peft
from exporter.progress import Task
from exporter.sources.tensors import FLOATS, item_size, open_to_read, read_into
from exporter.sources.values import DTYPES

# Bytes for each value of a block under way: read, float32 twice, the delta, the output.
ELEMENT_COST = 24
MAX_BLOCKS = 32


@dataclass(frozen=True, slots=True)
class WrittenTensor:
    """What stands in the file. sha256, source_sha256: of the output's bytes and the base's, None where not asked for.

    checksum: XXH3-128 of the output's bytes, which the proof compares. For a changed tensor, in float32 and summed in
    float64: delta_norm = ||S - W||, rounding_norm = ||W' - S||, with S = W + delta before its rounding to W'; their
    ratio is the share of the delta that rounding lost.
    """

    name: str
    sha256: str | None
    source_sha256: str | None
    checksum: str | None
    delta_norm: float = 0.0
    rounding_norm: float = 0.0


def write_shard(
    path: Path,
    shard: ShardLayout,
    tensors: tuple[OutputTensor, ...],
    model: ModelLayout,
    *,
    memory: int,
    hashed: bool,
    task: Task,
) -> list[WrittenTensor]:
    """Write `path`, synced to the disk, and return what each tensor became.

    memory: bytes that blocks under way may take. hashed: with digests and a look at every value for NaN and infinity;
    else untouched bytes are only moved. Raises InputRefused (non-finite or overflowing values, a source that ends
    early, all by name) and EnvironmentLacking (disk full, read error).
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    digests = [_Digest(name) for name in shard.order]
    with _environment_errors(path), ExitStack() as stack:
        target = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        stack.callback(os.close, target)
        writer = BlockWriter(target, max(2, min(MAX_BLOCKS, memory // 4 // BLOCK)), task.advance)
        stream = _Stream(writer, model, block_elements(memory), hashed)
        stack.callback(stream.close)
        stack.callback(writer.close)  # called first: its threads still read from the stream's files
        writer.put(memoryview(shard.header), 0)
        for digest in digests:
            stream.put(by_name[digest.name], shard.offsets[digest.name], digest)
        writer.finish()
    return [digest.written(by_name[digest.name], hashed) for digest in digests]


def block_elements(memory: int) -> int:
    """Values in one block of arithmetic, so that it takes a part of `memory` bytes."""
    return max(1, min(BLOCK_ELEMENTS, memory // 2 // ELEMENT_COST))


def tensor_blocks(tensor: OutputTensor, elements: int) -> list[tuple[int, int]]:
    """Ranges of rows in which a changed tensor is computed, here and in the proof."""
    source = tensor.source
    columns = source.row_bytes // item_size(source.dtype)
    whole = any(isinstance(change, PeftLayer) for change in tensor.changes)
    stacked = any(isinstance(change, LowRank) and change.experts > 1 for change in tensor.changes)
    group = source.shape[-2] if stacked else source.rows
    return row_blocks(source.rows, columns, group=group, whole=whole, elements=elements)


def prepare_updates(tensor: OutputTensor, model: ModelLayout, dtype: torch.dtype, elements: int) -> list[Update]:
    """The updates of a tensor's changes, in order, with factors in `dtype`."""
    return [
        prepare_peft(change, model)
        if isinstance(change, PeftLayer)
        else prepare(change, tensor.source, tensor.onto, dtype, elements)
        for change in tensor.changes
    ]


class _Stream:
    """One shard on its way. Files of the base stay open, so that one replaced meanwhile is read as it was."""

    def __init__(self, writer: BlockWriter, model: ModelLayout, elements: int, hashed: bool) -> None:
        self.writer, self.model, self.elements, self.hashed = writer, model, elements, hashed
        self.handles: dict[Path, int] = {}

    def close(self) -> None:
        for handle in self.handles.values():
            os.close(handle)

    def put(self, tensor: OutputTensor, offset: int, digest: "_Digest") -> None:
        handle = self._handle(tensor.source.file)
        if self.hashed and tensor.source is not tensor.base:
            self._hash_base(tensor, digest)
        if not tensor.is_copied:
            self._compute(tensor, offset, digest, handle)
        elif self.hashed:
            self._copy(tensor, offset, digest, handle)
        else:
            self.writer.move(handle, tensor.source.offset, tensor.nbytes, offset)

    def _handle(self, file: Path) -> int:
        if file not in self.handles:
            self.handles[file] = open_to_read(file)
            os.posix_fadvise(self.handles[file], 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return self.handles[file]

    def _copy(self, tensor: OutputTensor, offset: int, digest: "_Digest", handle: int) -> None:
        source = tensor.source
        for start in range(0, source.nbytes, BLOCK):
            buffer = self.writer.take()
            block = memoryview(buffer)[: min(BLOCK, source.nbytes - start)]
            read_into(handle, block, source.offset + start, source.file)
            self.writer.put(block, offset + start, lambda block=block: digest.copied(block, tensor), buffer)

    def _hash_base(self, tensor: OutputTensor, digest: "_Digest") -> None:
        """The digest of a tensor that the adapter's takes the place of: `unmerge` finds the base's by it."""
        base, handle = tensor.base, self._handle(tensor.base.file)
        block = memoryview(bytearray(BLOCK))
        for start in range(0, base.nbytes, BLOCK):
            part = block[: min(BLOCK, base.nbytes - start)]
            read_into(handle, part, base.offset + start, base.file)
            digest.source_sha256.update(part)

    def _compute(self, tensor: OutputTensor, offset: int, digest: "_Digest", handle: int) -> None:
        source = tensor.source
        onto = prepare_int8(tensor.onto, source, self.elements) if tensor.onto else None
        updates = prepare_updates(tensor, self.model, torch.float32, self.elements)
        for start, stop in tensor_blocks(tensor, self.elements):
            raw = bytearray((stop - start) * source.row_bytes)
            read_into(handle, memoryview(raw), source.offset + start * source.row_bytes, source.file)
            stored = torch.frombuffer(raw, dtype=DTYPES[source.dtype]).reshape(stop - start, *source.row_shape)
            before = stored.to(torch.float32)
            if onto is not None:
                before = onto(before, start, stop)
            total = before
            for update in updates:
                total = update(total, start, stop)
            output = total.to(DTYPES[tensor.dtype])
            _check_finite(tensor, stored, output)
            if updates:
                digest.measure(before, total, output)
            block = as_bytes(output)
            of_base = raw if source is tensor.base else b""
            digesting = (lambda raw=of_base, block=block: digest.computed(raw, block)) if self.hashed else None
            self.writer.put(block, offset, digesting)
            offset += len(block)


class _Digest:
    """A tensor's digests as its blocks go by."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.sha256, self.source_sha256, self.checksum = hashlib.sha256(), hashlib.sha256(), xxhash.xxh3_128()
        self.delta_square = self.rounding_square = 0.0

    def copied(self, block: memoryview, tensor: OutputTensor) -> None:
        if tensor.source.dtype in FLOATS and not all_finite(torch.frombuffer(block, dtype=DTYPES[tensor.dtype])):
            _refuse_non_finite(tensor)
        self.sha256.update(block)
        self.checksum.update(block)

    def computed(self, raw: bytes | bytearray, block: memoryview) -> None:
        self.source_sha256.update(raw)
        self.sha256.update(block)
        self.checksum.update(block)

    def measure(self, before: torch.Tensor, total: torch.Tensor, output: torch.Tensor) -> None:
        """Add one block to the norms of what was asked for and what its rounding did."""
        self.delta_square += square_sum(total - before)
        self.rounding_square += square_sum(output.to(torch.float32) - total)

    def written(self, tensor: OutputTensor, hashed: bool) -> WrittenTensor:
        norms = self.delta_square**0.5, self.rounding_square**0.5
        if not hashed:
            return WrittenTensor(self.name, None, None, None, *norms)
        sha256 = self.sha256.hexdigest()
        copied = tensor.is_copied and tensor.source is tensor.base
        source = sha256 if copied else self.source_sha256.hexdigest()
        return WrittenTensor(self.name, sha256, source, self.checksum.hexdigest(), *norms)


def square_sum(values: torch.Tensor) -> float:
    """Sum of squares of a block: float32 within rows, float64 over them."""
    if values.ndim < 2:
        return float(values.double().square().sum())
    return float(torch.linalg.vector_norm(values, dim=-1).double().square().sum())


def as_bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def all_finite(values: torch.Tensor) -> bool:
    """True if no value is NaN or infinite. One pass: a NaN or an infinity reaches the minimum or the maximum."""
    low, high = torch.aminmax(values) if values.numel() else (torch.zeros(()), torch.zeros(()))
    return bool(torch.isfinite(low) & torch.isfinite(high))


@contextmanager
def _environment_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except EOFError as error:
        raise InputRefused("a file of the base ended inside a tensor", todo="fetch or copy the file again") from error
    except OSError as error:
        raise EnvironmentLacking(
            f"writing {path.name.removeprefix('.').removesuffix('.partial')} failed: {error.strerror or error}",
            todo="free disk space or check the disk, then run the same command again: finished shards are kept",
        ) from error


def _check_finite(tensor: OutputTensor, stored: torch.Tensor, output: torch.Tensor) -> None:
    if stored.is_floating_point() and not all_finite(stored):
        _refuse_non_finite(tensor)
    if output.is_floating_point() and not all_finite(output):
        raise InputRefused(
            f"{tensor.name!r} overflows in {tensor.dtype}",
            expected=f"values up to {torch.finfo(output.dtype).max:.0f}",
            todo="choose --dtype bfloat16 or float32",
        )


def _refuse_non_finite(tensor: OutputTensor) -> None:
    owner = "base" if tensor.source is tensor.base else "adapter"
    raise InputRefused(
        f"the {owner}'s {tensor.source.name!r} holds NaN or infinity", expected="finite weights", todo="fetch it again"
    )
