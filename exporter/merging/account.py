"""The manifest's account of a merge: what was read, how it was computed, what came out."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exporter.manifest import stamp, versions
from exporter.merging.changes import LowRank
from exporter.merging.journal import FinishedShard
from exporter.merging.layout import ShardLayout, unaligned
from exporter.merging.output import OutputTensor
from exporter.merging.plan import MergePlan
from exporter.merging.request import MergeOptions
from exporter.merging.stream import WrittenTensor
from exporter.sources.tensors import ITEM_SIZES

FORMULA = "W' = round(W + sum_k weight_k * scale_k * B_k A_k), accumulated in float32, rounded once"
# Where rounding keeps less of a delta than this share, the user is told.
SWALLOWED = 0.5


def merge_section(
    plan: MergePlan,
    layouts: Sequence[ShardLayout],
    request: Mapping[str, Any],
    options: MergeOptions,
    shards: Mapping[str, FinishedShard],
    written: Mapping[str, WrittenTensor],
) -> dict[str, Any]:
    """The manifest's account: what was read, how it was computed, what came out."""
    probes = [probe for shard in shards.values() if shard.proof for probe in shard.proof.probes]
    tensors = {tensor.name: _tensor_entry(tensor, written[tensor.name]) for tensor in plan.tensors}
    return {
        "request": dict(request),
        "formula": FORMULA,
        "methods": [adapter.method for adapter, _ in plan.adapters],
        "scales": {t.name: [c.scale for c in t.changes if isinstance(c, LowRank)] for t in plan.changed},
        "dropped": dict(plan.dropped),
        "tied": dict(plan.tied),
        "untied": list(plan.untied),
        "memory": options.memory,
        "versions": versions(),
        "proof": [{"name": p.name, "error": p.error, "allowed": p.allowed, "delta": p.delta} for p in probes],
        "tensors": tensors,
        "swallowed": [name for name, entry in tensors.items() if entry.get("kept", 1) < SWALLOWED],
        "unaligned": unaligned(layouts),
    }


def _tensor_entry(tensor: OutputTensor, written: WrittenTensor) -> dict[str, Any]:
    """kept: the share of the delta's norm that rounding left, 1 - ||rounding|| / ||delta||, at least 0."""
    entry: dict[str, Any] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "sha256": written.sha256}
    if not tensor.is_copied or tensor.source is not tensor.base:
        entry["source"] = tensor.base.name
        entry["source_dtype"] = tensor.base.dtype
        entry["source_sha256"] = written.source_sha256
    if tensor.source is not tensor.base:
        entry["replaced_by"] = tensor.source.name
    if tensor.changes:
        entry["delta_norm"] = written.delta_norm
        entry["rounding_norm"] = written.rounding_norm
        lost = written.rounding_norm / written.delta_norm if written.delta_norm else 0.0
        entry["kept"] = max(0.0, 1 - lost)
    return entry


def is_account(section: object) -> bool:
    """True if a manifest's section has what undoing a merge needs, in the types that `merge_section` writes."""
    if not isinstance(section, dict):
        return False
    request, tensors = section.get("request"), section.get("tensors")
    if not isinstance(section.get("proof"), list) or not isinstance(request, dict) or not isinstance(tensors, dict):
        return False
    adapters, shard_size = request.get("adapters"), request.get("shard_size")
    weights = [one.get("weight") if isinstance(one, dict) else None for one in adapters or ()]
    texts = ("sha256", "source_sha256", "source", "source_dtype")
    return (
        isinstance(adapters, list)
        and all(isinstance(weight, int | float) and math.isfinite(weight) for weight in weights)
        and isinstance(shard_size, int)
        and shard_size > 0
        and request.get("onto", "original") in ("original", "int8")
        and all(isinstance(one, dict) and isinstance(one.get("sha256"), str) for one in tensors.values())
        and all(isinstance(one.get(key, ""), str) for one in tensors.values() for key in texts)
        and all(one.get("source_dtype", "F32") in ITEM_SIZES for one in tensors.values())
    )


def describe_shard(path: Path, shard: FinishedShard) -> dict[str, Any]:
    return {**stamp(path), "sha256": shard.proof.sha256 if shard.proof else None}
