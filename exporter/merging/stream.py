"""Write one shard of a plan: untouched bytes as they are, changed tensors in blocks of rows, a digest of each."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from exporter.errors import EnvironmentLacking, InputRefused
from exporter.merging.delta import ROW_BLOCK, add_and_round, lora_delta_rows
from exporter.merging.layout import ShardLayout
from exporter.merging.plan import OutputTensor, WeightedFactors
from exporter.progress import Task
from exporter.sources.tensors import DTYPES, FLOATS, read_bytes, read_rows, read_tensor

# The memory of a block is its bytes read, its fp32 copy, the delta and the sum: about 16 bytes an element.
ELEMENT_COST = 20
COPY_BLOCK = 16 << 20


@dataclass(frozen=True, slots=True)
class WrittenTensor:
    """sha256 of the output's bytes. For a changed tensor: norms in float64 of what was asked for and what rounding did.

    delta_norm = ||delta||, rounding_norm = ||(W' - W) - delta||; their ratio is the share of the delta that was lost.
    """

    name: str
    sha256: str
    source_sha256: str
    delta_norm: float = 0.0
    rounding_norm: float = 0.0


def write_shard(
    path: Path, layout: ShardLayout, tensors: tuple[OutputTensor, ...], memory: int, task: Task
) -> tuple[list[WrittenTensor], str]:
    """Write `path` and return what each tensor became and the file's SHA-256. `memory` bounds the blocks, in bytes.

    Raises InputRefused (non-finite or overflowing values, all by name), EnvironmentLacking (disk full, read error).
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    whole = hashlib.sha256(layout.header)
    written = []
    try:
        with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as hasher:
            _write_all(file.fileno(), layout.header)
            for name in layout.order:
                sink = _Sink(file.fileno(), whole, hasher, task)
                written.append(_write_tensor(by_name[name], memory, sink))
    except OSError as error:
        raise EnvironmentLacking(
            f"writing {path.name.strip('.').removesuffix('.partial')} failed: {error.strerror or error}",
            todo="free disk space or check the disk, then run the same command again",
        ) from error
    return written, whole.hexdigest()


class _Sink:
    """Writes blocks in order while another thread hashes them."""

    def __init__(self, handle: int, whole: "hashlib._Hash", hasher: ThreadPoolExecutor, task: Task) -> None:
        self.handle, self.whole, self.hasher, self.task = handle, whole, hasher, task
        self.digest = hashlib.sha256()

    def put(self, data: memoryview) -> None:
        hashed = self.hasher.submit(self._hash, data)
        _write_all(self.handle, data)
        hashed.result()
        self.task.advance(len(data))

    def _hash(self, data: memoryview) -> None:
        self.digest.update(data)
        self.whole.update(data)


def _write_all(handle: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while len(view):
        view = view[os.write(handle, view) :]


def _as_bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write_tensor(tensor: OutputTensor, memory: int, sink: _Sink) -> WrittenTensor:
    if tensor.is_copied:
        for block in _copied_blocks(tensor):
            sink.put(block)
        digest = sink.digest.hexdigest()
        return WrittenTensor(tensor.name, digest, digest)
    source_digest = hashlib.sha256()
    factors = [(read_factors(weighted), weighted) for weighted in tensor.deltas]
    delta_square = rounding_square = 0.0
    for start, stop in row_blocks(tensor, memory):
        stored = read_rows(tensor.source, start, stop) if tensor.shape else read_tensor(tensor.source)
        source_digest.update(_as_bytes(stored))
        deltas = [lora_delta_rows(*pair, w.scale, w.orientation, start, stop) for pair, w in factors]
        output = add_and_round(stored, deltas, DTYPES[tensor.dtype])
        _check_finite(tensor, stored, output)
        sink.put(_as_bytes(output))
        if deltas:
            delta = torch.stack(deltas).sum(0) if len(deltas) > 1 else deltas[0]
            delta_square += float(delta.double().square().sum())
            lost = output.double() - stored.double() - delta.double()
            rounding_square += float(lost.square().sum())
    return WrittenTensor(
        tensor.name, sink.digest.hexdigest(), source_digest.hexdigest(), delta_square**0.5, rounding_square**0.5
    )


def read_factors(weighted: WeightedFactors) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in) and B (out, r) in float32. InputRefused where one holds a value that is not finite."""
    pair = []
    for info in (weighted.factors.down, weighted.factors.up):
        factor = read_tensor(info).to(torch.float32)
        if not torch.isfinite(factor).all():
            raise InputRefused(f"the adapter's {info.name!r} holds NaN or infinity", expected="finite factors")
        pair.append(factor)
    return pair[0], pair[1]


def row_blocks(tensor: OutputTensor, memory: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows whose arithmetic fits into `memory` bytes, each a multiple of ROW_BLOCK rows but the last."""
    rows = tensor.source.rows
    elements = max(1, tensor.source.row_bytes // DTYPES[tensor.source.dtype].itemsize)
    fitting = memory // (elements * ELEMENT_COST)
    step = max(ROW_BLOCK, fitting // ROW_BLOCK * ROW_BLOCK)
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def _copied_blocks(tensor: OutputTensor) -> Iterator[memoryview]:
    source = tensor.source
    for start in range(0, source.nbytes, COPY_BLOCK):
        data = read_bytes(source.file, source.offset + start, min(COPY_BLOCK, source.nbytes - start))
        if source.dtype in FLOATS:
            values = torch.frombuffer(data, dtype=DTYPES[source.dtype])
            if not all_finite(values):
                raise InputRefused(
                    f"the base's {source.name!r} holds NaN or infinity",
                    expected="finite weights",
                    todo="fetch it again",
                )
        yield memoryview(data)


def all_finite(values: torch.Tensor) -> bool:
    """True if no value is NaN or infinite. One pass: a NaN or an infinity reaches the minimum or the maximum."""
    low, high = torch.aminmax(values) if values.numel() else (torch.zeros(()), torch.zeros(()))
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _check_finite(tensor: OutputTensor, stored: torch.Tensor, output: torch.Tensor) -> None:
    if stored.is_floating_point() and not all_finite(stored):
        raise InputRefused(
            f"the base's {tensor.source.name!r} holds NaN or infinity", expected="finite weights", todo="fetch it again"
        )
    if output.is_floating_point() and not all_finite(output):
        raise InputRefused(
            f"{tensor.name!r} overflows in {tensor.dtype}",
            expected=f"values up to {torch.finfo(output.dtype).max:.0f}",
            todo="choose --dtype bfloat16 or float32",
        )
