"""Proof after writing: what stands on the disk is what was computed, and what was computed is base + delta."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from exporter.errors import InputRefused
from exporter.merging.blocks import BLOCK
from exporter.merging.changes import LowRank
from exporter.merging.delta import prepare_int8, read_factors
from exporter.merging.modules import ModelLayout
from exporter.merging.output import OutputTensor
from exporter.merging.stream import (
    WrittenTensor,
    block_elements,
    prepare_updates,
    tensor_blocks,
)
from exporter.merging.threads import thread_pool
from exporter.progress import Task
from exporter.sources.safetensors_file import read_header
from exporter.sources.tensors import TensorInfo, read_into
from exporter.sources.values import DTYPES, read_rows

PROBES = 4


@dataclass(frozen=True, slots=True)
class Probe:
    """Random vectors x: error = ||(W' - W) x - delta x|| and allowed = what one rounding of W' explains."""

    name: str
    error: float
    allowed: float
    delta: float

    @property
    def holds(self) -> bool:
        # A delta below what rounding explains cannot be told from a no-op by a probe; its element bound still can.
        return self.error <= self.allowed


@dataclass(frozen=True, slots=True)
class ShardProof:
    """sha256: of the whole file, read again. probes: one for each tensor that an adapter changed."""

    sha256: str
    probes: tuple[Probe, ...]


def prove_shard(
    path: Path,
    tensors: tuple[OutputTensor, ...],
    written: Mapping[str, WrittenTensor],
    model: ModelLayout,
    memory: int,
    task: Task,
) -> ShardProof:
    """Reopen `path`: every tensor's checksum, every changed tensor's probe. InputRefused at the first difference."""
    headers, _ = read_header(path)
    if set(headers) != {tensor.name for tensor in tensors}:
        raise InputRefused(f"{path.name} does not hold the tensors that were written", todo="check the disk")
    digest = _read_again(path, headers, written, task)
    probes = []
    for tensor in tensors:
        if not tensor.changes:
            continue
        probe = probe_tensor(tensor, headers[tensor.name], model, memory)
        if not probe.holds:
            raise InputRefused(
                f"{tensor.name!r} in {path.name} differs from base + delta by {probe.error:.3g}",
                expected=f"at most {probe.allowed:.3g}, one rounding",
                todo="check the memory of this machine, and report this as a bug",
            )
        probes.append(probe)
    return ShardProof(digest, tuple(probes))


def _read_again(path: Path, headers: Mapping[str, TensorInfo], written: Mapping[str, WrittenTensor], task: Task) -> str:
    """The file's SHA-256, and each tensor's checksum against what was written, in one pass."""
    whole = hashlib.sha256()
    buffers = [bytearray(BLOCK), bytearray(BLOCK)]
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with thread_pool(1) as hasher:
            first = min((info.offset for info in headers.values()), default=path.stat().st_size)
            header = bytearray(first)
            read_into(handle, memoryview(header), 0, path)
            whole.update(header)
            hashing = hasher.submit(lambda: None)
            turn = 0
            for info in sorted(headers.values(), key=lambda info: (info.offset, info.nbytes)):
                checksum = xxhash.xxh3_128()
                for start in range(0, info.nbytes, BLOCK):
                    turn ^= 1
                    block = memoryview(buffers[turn])[: min(BLOCK, info.nbytes - start)]
                    read_into(handle, block, info.offset + start, path)
                    hashing.result()
                    hashing = hasher.submit(whole.update, block)
                    checksum.update(block)
                    task.advance(len(block))
                if checksum.hexdigest() != written[info.name].checksum:
                    raise InputRefused(
                        f"{info.name!r} in {path.name} is not what was written",
                        expected="equal digests",
                        todo="check the disk",
                    )
            hashing.result()
    finally:
        os.close(handle)
    return whole.hexdigest()


def probe_tensor(tensor: OutputTensor, output: TensorInfo, model: ModelLayout, memory: int) -> Probe:
    """(W' - W) x against delta x in float64 for PROBES standard normal vectors x.

    For such x the expectation of ||E x||^2 is ||E||_F^2, and rounding leaves |E_ij| <= eps/2 |W'_ij| (Higham,
    "Accuracy and Stability of Numerical Algorithms", section 2.1): so ||E x|| stays below twice the bound's norm.
    """
    limits = torch.finfo(DTYPES[tensor.dtype])
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(tensor.name.encode()).digest()[:4]))
    columns = output.row_shape[0] if output.row_shape else 1
    x = torch.randn(columns, PROBES, dtype=torch.float64, generator=generator)  # (columns, K)
    elements = block_elements(memory)
    expected = _Expected(tensor, model, x, elements)
    error = bound = asked = 0.0
    for start, stop in tensor_blocks(tensor, elements):
        before = read_rows(tensor.source, start, stop)
        after = read_rows(output, start, stop)
        wanted, got = expected.rows(before, after, start, stop)
        error += float((got - wanted).square().sum())
        asked += float(wanted.square().sum())
        # The fp32 sum before the last rounding adds up to (r + 2) 2^-24 of its terms.
        slack = limits.eps / 2 + 2**-22
        bound += 2 * float(slack**2 * torch.linalg.vector_norm(after.float()).double().square())
        bound += 2 * after.numel() * (limits.smallest_normal * limits.eps) ** 2
    return Probe(tensor.name, error**0.5, 2 * (PROBES * bound) ** 0.5, asked**0.5)


class _Expected:
    """What the changes of one tensor do to x, in float64: s B (A x) for plain LoRA, else the method's arithmetic."""

    def __init__(self, tensor: OutputTensor, model: ModelLayout, x: torch.Tensor, elements: int) -> None:
        self.x, self.transposed = x, x.T.contiguous()
        self.onto = prepare_int8(tensor.onto, tensor.source, elements) if tensor.onto else None
        self.low_rank: list[tuple[torch.Tensor, torch.Tensor]] = []  # each (rows, r) and (r, K)
        self.updates = []
        if all(isinstance(change, LowRank) and change.experts == 1 for change in tensor.changes):
            for change in tensor.changes:
                assert isinstance(change, LowRank)
                down, up = read_factors(change, torch.float64)
                if change.orientation == "out_in":
                    self.low_rank.append((up, change.scale * (down @ x)))
                else:
                    self.low_rank.append((down.T, change.scale * (up.T @ x)))
        else:
            self.updates = prepare_updates(tensor, model, torch.float64, elements)

    def rows(
        self, before: torch.Tensor, after: torch.Tensor, start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(delta x, (W' - W) x) of these rows, both (rows, K) in float64."""
        base = self.onto(before.float(), start, stop) if self.onto else before
        if self.low_rank:
            # Half-precision values differ exactly in float32, but for bits far below one rounding.
            wide = torch.float64 if torch.float32 in (after.dtype, before.dtype) or self.onto else torch.float32
            change = (after.to(wide) - base.to(wide)).double()
            wanted = sum((left[start:stop] @ right for left, right in self.low_rank), torch.zeros(()))
            return wanted, self._times_x(change)
        total = base = base.double()
        for update in self.updates:
            total = update(total, start, stop)
        change = after.double() - base
        return self._times_x(total - base), self._times_x(change)

    def _times_x(self, values: torch.Tensor) -> torch.Tensor:
        """values x, as (x^T values^T)^T: a matrix product with few rows is twice as fast as one with few columns."""
        return (self.transposed @ values.reshape(-1, self.x.shape[0]).T).T
