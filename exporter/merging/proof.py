"""Proof after writing: what stands on the disk is what was computed, and what was computed is base + delta."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from exporter.errors import InputRefused
from exporter.merging.delta import lora_delta_rows
from exporter.merging.plan import OutputTensor
from exporter.merging.stream import COPY_BLOCK, WrittenTensor, read_factors, row_blocks
from exporter.progress import Task
from exporter.sources.safetensors_file import read_header
from exporter.sources.tensors import DTYPES, TensorInfo, read_bytes, read_rows

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


def prove_shard(
    path: Path, tensors: tuple[OutputTensor, ...], written: Mapping[str, WrittenTensor], memory: int, task: Task
) -> list[Probe]:
    """Reopen `path`: every tensor's digest, every changed tensor's probe. InputRefused at the first difference."""
    headers, _ = read_header(path)
    if set(headers) != {tensor.name for tensor in tensors}:
        raise InputRefused(f"{path.name} does not hold the tensors that were written", todo="check the disk")
    probes = []
    for tensor in tensors:
        info = headers[tensor.name]
        if digest_on_disk(info, task) != written[tensor.name].sha256:
            raise InputRefused(
                f"{tensor.name!r} in {path.name} is not what was written",
                expected="equal digests",
                todo="check the disk",
            )
        if tensor.deltas:
            probe = probe_tensor(tensor, info, memory)
            if not probe.holds:
                raise InputRefused(
                    f"{tensor.name!r} in {path.name} differs from base + delta by {probe.error:.3g}",
                    expected=f"at most {probe.allowed:.3g}, one rounding",
                    todo="check the memory of this machine, and report this as a bug",
                )
            probes.append(probe)
    return probes


def digest_on_disk(info: TensorInfo, task: Task) -> str:
    digest = hashlib.sha256()
    for start in range(0, info.nbytes, COPY_BLOCK):
        block = read_bytes(info.file, info.offset + start, min(COPY_BLOCK, info.nbytes - start))
        digest.update(block)
        task.advance(len(block))
    return digest.hexdigest()


def probe_tensor(tensor: OutputTensor, output: TensorInfo, memory: int) -> Probe:
    """(W' - W) x against delta x in float64 for PROBES standard normal vectors x.

    For such x the expectation of ||E x||^2 is ||E||_F^2, and rounding leaves |E_ij| <= eps/2 |W'_ij| (Higham,
    "Accuracy and Stability of Numerical Algorithms", section 2.1): so ||E x|| stays below twice the bound's norm.
    """
    dtype = DTYPES[tensor.dtype]
    limits = torch.finfo(dtype)
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(tensor.name.encode()).digest()[:4]))
    x = torch.randn(tensor.shape[1], PROBES, dtype=torch.float64, generator=generator)  # (columns, K)
    factors = [(read_factors(weighted), weighted) for weighted in tensor.deltas]
    error = bound = asked = 0.0
    for start, stop in row_blocks(tensor, memory // 2):
        before = read_rows(tensor.source, start, stop).double()
        after = read_rows(output, start, stop).double()
        delta = torch.zeros_like(after)
        for (down, up), w in factors:
            delta += lora_delta_rows(down.double(), up.double(), w.scale, w.orientation, start, stop)
        wanted = delta @ x
        error += float(((after - before) @ x - wanted).square().sum())
        # The fp32 sum before the last rounding adds up to (r + 2) 2^-24 of its terms.
        slack = after.abs() * (limits.eps / 2 + 2**-22) + limits.smallest_normal * limits.eps
        bound += float(slack.square().sum())
        asked += float(wanted.square().sum())
    return Probe(tensor.name, error**0.5, 2 * (PROBES * bound) ** 0.5, asked**0.5)
