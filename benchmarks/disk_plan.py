"""What a full-size run needs on the disk, from shapes alone."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod

BLOCK, SCALE = 32, 2  # of the int8 and int4 bundles: weights a block, bytes of its float16 scale
# `verify` keeps float32 logits of up to this many models at once: reference, truth, base, merged, and three of a bundle
MODELS, POSITIONS = 7, 3600  # scored positions at level commit, rounded up
SMALL = 64 << 20  # tokenizers, graphs, manifests and reports


@dataclass(frozen=True)
class DiskPlan:
    """Bytes of each part. buffers: old causal masks that the base holds and the merge drops."""

    base: int
    merged: int
    int8: int
    int4: int
    logits: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values()) + SMALL


def plan_disk(shapes: Mapping[str, tuple[int, ...]], width: int, buffers: int, vocabulary: int) -> DiskPlan:
    """shapes: the base's tensors without its old buffers; buffers: bytes of those. width: bytes a value."""
    merged = sum(width * prod(shape) for shape in shapes.values())
    return DiskPlan(
        base=merged + buffers,
        merged=merged,
        int8=_quantized(shapes, width, 8),
        int4=_quantized(shapes, width, 4),
        logits=4 * MODELS * POSITIONS * vocabulary,
    )


def _quantized(shapes: Mapping[str, tuple[int, ...]], width: int, bits: int) -> int:
    """The blocks' matrices in `bits`, the embedding of tokens in 8, everything else as it is stored."""
    total = 0
    for name, shape in shapes.items():
        values = prod(shape)
        if name.endswith("wte.weight"):
            total += values + SCALE * values // BLOCK
        elif len(shape) == 2 and ".h." in name:
            total += values * bits // 8 + SCALE * values // BLOCK
        else:
            total += width * values
    return total
