"""`exporter merge`: from a base and adapters to a checkpoint that transformers loads, streamed and proven."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from exporter.errors import ExporterError, InputRefused, UsageError
from exporter.files import (
    LOCK,
    disk_errors,
    lock_directory,
    removed_if_empty,
    require_free_space,
)
from exporter.merging.account import merge_section
from exporter.merging.card import small_files
from exporter.merging.changes import AddVector, LowRank, PeftLayer, ReplaceRows, WeightDecomposed
from exporter.merging.delta import read_factors
from exporter.merging.journal import Journal
from exporter.merging.layout import ShardLayout, Slot, lay_out
from exporter.merging.output import OutputTensor
from exporter.merging.plan import MergePlan, Onto, plan_merge
from exporter.merging.publish import publish_checkpoint, remove_partials
from exporter.merging.request import (
    STAGE,
    MergeOptions,
    describe_request,
    is_done,
    readable_manifest,
    refuse_changed_inputs,
    refuse_foreign_directory,
    refuse_inputs_as_output,
)
from exporter.merging.shards import write_shards
from exporter.progress import SILENT, Progress
from exporter.sources.adapter import open_adapter
from exporter.sources.checkpoint import open_checkpoint
from exporter.sources.hub import Source, resolve

SPARE = 16 << 20  # free bytes beside the weights, for the small files


@dataclass(frozen=True, slots=True)
class MergedCheckpoint:
    """What `merge` made. `section` is the manifest's account of it."""

    directory: Path
    plan: MergePlan
    section: Mapping[str, Any]
    skipped: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {"directory": str(self.directory), "skipped": self.skipped, **self.section}


def merge(
    *,
    base: str | Path,
    adapter: str | Path | Sequence[str | Path],
    out: str | Path,
    weight: Sequence[float] = (),
    dtype: str = "auto",
    onto: Onto = "original",
    shard_size: int = 5_000_000_000,
    memory: int = 1_000_000_000,
    proof: Literal["full", "none"] = "full",
    template: str | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> MergedCheckpoint:
    """Merge one or more adapters into `base` and write a transformers checkpoint to `out`.

    base, adapter: a directory or a hub id `owner/name[@revision]`. weight: one per adapter, default 1.
    dtype: "auto" keeps each tensor's stored type. onto: "int8" adds to what bitsandbytes' int8 codes of the base mean.
    shard_size, memory: bytes. proof: "none" only writes: no digests, no look at untouched values, nothing read again.
    template: a chat template's name or text; default: the adapter's, else the base's, else none.
    force: replace what `out` holds. A merge that was killed goes on with the shards it had finished.
    Raises UsageError, InputRefused or EnvironmentLacking; then what `out` held is as it was.
    """
    adapters = [adapter] if isinstance(adapter, str | Path) else list(adapter)
    base_source = resolve(base, kind="base", progress=progress)
    sources = [resolve(one, kind="adapter", progress=progress) for one in adapters]
    options = MergeOptions(tuple(weight), dtype, onto, shard_size, memory, proof, template)
    return merge_sources(base_source, sources, Path(out), options, force=force, progress=progress)


def merge_sources(
    base: Source,
    adapters: Sequence[Source],
    out: Path,
    options: MergeOptions,
    *,
    force: bool = False,
    progress: Progress = SILENT,
) -> MergedCheckpoint:
    """`merge` for sources that are already on this machine."""
    refuse_inputs_as_output(out, [base, *adapters])
    plan = plan_sources(base, adapters, options)
    refuse_zero_factors(plan)
    layouts = [lay_out(Slot(t.name, t.dtype, t.shape, t.nbytes) for t in shard) for shard in plan.shards]
    request = describe_request(base, adapters, plan, options)
    if not force and (section := _done(out, request)):
        _tidy(out)
        return MergedCheckpoint(out, plan, section, skipped=True)
    with disk_errors(out):
        _begin(out, request, force)
    with removed_if_empty(out), lock_directory(out), disk_errors(out):
        # Again, now that no other process can write: one may have finished since.
        if not force and (section := _done(out, request)):
            return MergedCheckpoint(out, plan, section, skipped=True)
        journal = _begin(out, request, force)
        remove_partials(out, journal)
        needed = sum(layout.size for layout in layouts) - journal.nbytes + SPARE
        require_free_space(out, needed, "the merged checkpoint")
        if journal.is_begun:
            progress.note(f"{out}: going on with a merge that was interrupted, {journal.nbytes} bytes are done")
        try:
            section = _write(out, plan, layouts, journal, base, adapters, request, options, progress)
        except InputRefused:
            journal.forget()
            raise
        finally:
            remove_partials(out, journal)
    return MergedCheckpoint(out, plan, section)


def _done(out: Path, request: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The manifest's account of this very merge, if `out` holds it."""
    manifest = readable_manifest(out)
    with suppress(OSError):  # an output that cannot be read is not done
        return manifest["stages"][STAGE] if manifest and is_done(out, manifest, request) else None
    return None


def _begin(out: Path, request: Mapping[str, Any], force: bool) -> Journal:
    """What a merge that was killed left to go on with. UsageError if `out` holds something else."""
    journal = Journal(out, request)
    refuse_foreign_directory(out, readable_manifest(out), force or journal.is_begun)
    return journal


def _tidy(out: Path) -> None:
    """Take away what a process that was killed just before its end left beside a finished merge."""
    if (out / LOCK).exists() or any(out.glob(".*.partial")):
        with suppress(ExporterError, OSError), lock_directory(out):
            remove_partials(out, None)


def plan_sources(base: Source, adapters: Sequence[Source], options: MergeOptions) -> MergePlan:
    """The plan of a merge, from headers alone."""
    weights = options.weights
    if not adapters:
        raise UsageError("no adapter", expected="one --adapter or more")
    if weights and len(weights) != len(adapters):
        raise UsageError(f"{len(weights)} weights for {len(adapters)} adapters", expected="one --weight per --adapter")
    if not all(math.isfinite(weight) for weight in weights):
        raise UsageError(f"--weight {weights}", expected="finite numbers")
    if options.proof not in ("full", "none"):
        raise UsageError(f"--proof {options.proof}", expected="full or none")
    opened = [open_adapter(source.directory) for source in adapters]
    return plan_merge(
        open_checkpoint(base.directory),
        list(zip(opened, weights or [1.0] * len(opened), strict=True)),
        dtype=options.dtype,
        shard_size=options.shard_size,
        onto=options.onto,
    )


def refuse_zero_factors(plan: MergePlan) -> None:
    """An adapter whose B is zero everywhere changes nothing: it was never trained, or it was saved wrongly."""
    for adapter, _ in plan.adapters:
        changes = [c for t in plan.changed for c in t.changes if isinstance(c, LowRank) and c.down.file == adapter.file]
        if any(_does_more(tensor, adapter.file) for tensor in plan.changed):
            continue  # something else than plain LoRA: what it changes is seen when it is written
        if not any(down.any() and up.any() for down, up in map(read_factors, changes)):
            raise InputRefused(
                f"every factor B (or A) in {adapter.file} is zero, so merging would change nothing",
                expected="a trained adapter",
                todo="check that training ran and that the right checkpoint was saved",
            )


def _does_more(tensor: OutputTensor, file: Path) -> bool:
    """True if the adapter in `file` does something else to the tensor than to add B A."""
    others = (change for change in tensor.changes if not isinstance(change, LowRank))
    return tensor.source.file == file or any(_file_of(change) == file for change in others)


def _file_of(change: WeightDecomposed | AddVector | ReplaceRows | PeftLayer) -> Path:
    match change:
        case WeightDecomposed():
            return change.magnitude.file
        case AddVector():
            return change.vector.file
        case ReplaceRows():
            return change.values.file
        case PeftLayer():
            return next(iter(change.tensors.values())).file


def _write(
    out: Path,
    plan: MergePlan,
    layouts: Sequence[ShardLayout],
    journal: Journal,
    base: Source,
    adapters: Sequence[Source],
    request: Mapping[str, Any],
    options: MergeOptions,
    progress: Progress,
) -> dict[str, Any]:
    def check_inputs() -> None:
        refuse_changed_inputs(request, describe_request(base, adapters, plan, options))

    small = small_files(plan, base, adapters, options.dtype, options.template, progress)
    shards = write_shards(
        out,
        plan,
        layouts,
        journal,
        memory=options.memory,
        proven=options.proof == "full",
        check_inputs=check_inputs,
        progress=progress,
    )
    written = {tensor.name: tensor for shard in shards.values() for tensor in shard.written}
    if not any(t.source is not t.base or written[t.name].delta_norm for t in plan.changed):
        raise InputRefused("merging changed no value", expected="a trained adapter", todo="check what was saved")
    check_inputs()
    section = merge_section(plan, layouts, request, options, shards, written)
    publish_checkpoint(out, shards, small, section, journal)
    for name in section["swallowed"]:
        progress.note(f"{name}: rounding to {section['tensors'][name]['dtype']} swallowed more than half of the delta")
    return section
