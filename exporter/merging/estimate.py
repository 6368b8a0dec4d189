"""What a merge will take: memory from the plan, time from rates measured on this machine just now."""

import hashlib
import time
from dataclasses import dataclass

import torch

from exporter.merging.changes import PeftLayer
from exporter.merging.plan import MergePlan
from exporter.sources.tensors import item_size, read_bytes

SAMPLE = 16 << 20
# The module in float32, and at most eight times as much beside it: see `peft_layer.merge_module`.
PEFT_COPIES = 9
# Of the output's bytes, default proof: each is read, hashed and written, then read and hashed again, on two threads.
PASSES = 2


@dataclass(frozen=True, slots=True)
class Estimate:
    """memory: bytes for tensors, at most. seconds: about, with the default proof."""

    memory: int
    seconds: float


def estimate_merge(plan: MergePlan, memory: int) -> Estimate:
    """Reads and hashes 16 MB of the base and multiplies a small matrix: a few hundredths of a second."""
    return Estimate(max(memory, peft_memory(plan)), _seconds(plan))


def peft_memory(plan: MergePlan) -> int:
    """Bytes that the largest module of a method that PEFT's own layer merges takes: it is not cut into rows."""
    elements = [
        sum(info.nbytes // item_size(info.dtype) for info in change.parameters.values())
        for tensor in plan.changed
        for change in tensor.changes
        if isinstance(change, PeftLayer)
    ]
    return max(elements, default=0) * 4 * PEFT_COPIES


def _seconds(plan: MergePlan) -> float:
    largest = max(plan.tensors, key=lambda tensor: tensor.source.nbytes)
    sample = min(SAMPLE, largest.source.nbytes)
    if not sample:
        return 0.0
    began = time.perf_counter()
    hashlib.sha256(read_bytes(largest.source.file, largest.source.offset, sample)).digest()
    moved = time.perf_counter() - began
    block = torch.ones(1 << 18)
    began = time.perf_counter()
    (block + block * 0.5).to(torch.float16)
    computed = (time.perf_counter() - began) / block.numel()
    elements = sum(t.nbytes // item_size(t.dtype) for t in plan.tensors if not t.is_copied)
    return PASSES * plan.nbytes * moved / sample + 4 * elements * computed
