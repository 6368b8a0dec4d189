"""`exporter inspect`: what a merge would do, from headers, configurations, the adapter and a sample of the base."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exporter.errors import ExporterError, InputRefused
from exporter.merging.card import licence_of
from exporter.merging.changes import AddVector, Change, LowRank, PeftLayer, ReplaceRows, WeightDecomposed
from exporter.merging.estimate import estimate_merge
from exporter.merging.merge import plan_sources, refuse_zero_factors
from exporter.merging.output import OutputTensor
from exporter.merging.plan import MergePlan, Onto
from exporter.merging.request import MergeOptions
from exporter.progress import SILENT, Progress
from exporter.sources.hub import Source, resolve
from exporter.sources.tokenizer import build_tokenizer_json, tokenizer_files


@dataclass(frozen=True, slots=True)
class Part:
    """The base or one adapter: where it comes from, its licence, its size in bytes and tensors."""

    source: str
    commit: str | None
    licence: str
    nbytes: int
    tensors: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """disk, memory: bytes that `merge` needs. seconds: about how long it takes, from this machine's own rates.

    changed: weights and what is done to each. problems: what would stop the merge.
    """

    base: Part | None
    adapters: tuple[Part, ...]
    architecture: str
    parameters: int
    changed: tuple[dict[str, Any], ...]
    untouched: int
    dropped: dict[str, str]
    shards: int
    disk: int
    memory: int
    seconds: float
    vocab_size: int | None
    untied: tuple[str, ...]
    problems: tuple[str, ...]
    exit_code: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect(
    *,
    base: str | Path,
    adapter: str | Path | Sequence[str | Path],
    weight: Sequence[float] = (),
    dtype: str = "auto",
    onto: Onto = "original",
    shard_size: int = 5_000_000_000,
    memory: int = 1_000_000_000,
    progress: Progress = SILENT,
) -> Inspection:
    """Plan a merge without reading a weight of the base.

    Problems are listed, not raised; `exit_code` is the first one's.
    """
    adapters = [adapter] if isinstance(adapter, str | Path) else list(adapter)
    problems: list[ExporterError] = []
    base_source, plan = None, None
    sources: list[Source] = []
    try:
        base_source = resolve(base, kind="base", progress=progress)
        sources = [resolve(one, kind="adapter", progress=progress) for one in adapters]
        options = MergeOptions(tuple(weight), dtype, onto, shard_size, memory)
        plan = plan_sources(base_source, sources, options)
    except ExporterError as error:
        problems.append(error)
    for check in (_zero_factors, _tokenizer):
        if base_source is not None and plan is not None:
            try:
                check(plan, base_source, sources)
            except InputRefused as error:
                problems.append(error)
    return _describe(base_source, sources, plan, memory, problems)


def _zero_factors(plan: MergePlan, base: Source, adapters: Sequence[Source]) -> None:
    refuse_zero_factors(plan)


def _tokenizer(plan: MergePlan, base: Source, adapters: Sequence[Source]) -> None:
    chosen = tokenizer_files(base.directory, [source.directory for source in adapters])
    if not chosen.has_fast:
        build_tokenizer_json(chosen.directory)


def _describe(
    base: Source | None, adapters: Sequence[Source], plan: MergePlan | None, memory: int, problems: list[ExporterError]
) -> Inspection:
    texts = tuple(str(problem) for problem in problems)
    code = problems[0].exit_code if problems else 0
    if base is None or plan is None:
        return Inspection(None, (), "unknown", 0, (), 0, {}, 0, 0, 0, 0.0, None, (), texts, code)
    changed = tuple(_describe_tensor(tensor) for tensor in plan.changed)
    estimate = estimate_merge(plan, memory)
    parts = []
    for source, (adapter, _) in zip(adapters, plan.adapters, strict=True):
        size = sum(info.nbytes for info in adapter.tensors.values())
        name = source.id or str(source.directory)
        parts.append(Part(name, source.commit, licence_of(source.directory), size, len(adapter.tensors)))
    whole = Part(
        base.id or str(base.directory),
        base.commit,
        licence_of(base.directory),
        plan.base.nbytes,
        len(plan.base.tensors),
    )
    return Inspection(
        base=whole,
        adapters=tuple(parts),
        architecture=", ".join(plan.base.config.get("architectures") or [str(plan.base.config.get("model_type"))]),
        parameters=plan.parameters,
        changed=changed,
        untouched=len(plan.tensors) - len(changed),
        dropped=dict(plan.dropped),
        shards=len(plan.shards),
        disk=plan.nbytes + (16 << 20),
        memory=estimate.memory,
        seconds=estimate.seconds,
        vocab_size=plan.vocab_size,
        untied=plan.untied,
        problems=texts,
        exit_code=code,
    )


def _describe_tensor(tensor: OutputTensor) -> dict[str, Any]:
    """rank, scale: one for each LoRA that is added."""
    low_rank = [c.low_rank if isinstance(c, WeightDecomposed) else c for c in tensor.changes]
    factors = [change for change in low_rank if isinstance(change, LowRank)]
    return {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "dtype": tensor.dtype,
        "how": [*(["replaced"] if tensor.source is not tensor.base else []), *map(_name_change, tensor.changes)],
        "rank": [change.rank for change in factors],
        "scale": [change.scale for change in factors],
        "orientation": factors[0].orientation if factors else None,
    }


def _name_change(change: Change) -> str:
    match change:
        case LowRank():
            return "LoRA" if change.experts == 1 else f"LoRA of {change.experts} experts"
        case WeightDecomposed():
            return "DoRA"
        case AddVector():
            return "bias of B"
        case ReplaceRows():
            return f"{len(change.rows)} tokens"
        case PeftLayer():
            return change.method
