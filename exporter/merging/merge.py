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
    partial_path,
    removed_if_empty,
    require_free_space,
    sync_directory,
    write_partial,
)
from exporter.manifest import MANIFEST, describe_file, manifest_bytes, read_manifest, stamp, versions
from exporter.merging.card import small_files
from exporter.merging.changes import LowRank
from exporter.merging.delta import read_factors
from exporter.merging.journal import FinishedShard, Journal
from exporter.merging.layout import ShardLayout, Slot, lay_out, unaligned
from exporter.merging.plan import MergePlan, Onto, OutputTensor, plan_merge
from exporter.merging.request import (
    STAGE,
    MergeOptions,
    describe_request,
    is_done,
    refuse_changed_inputs,
    refuse_foreign_directory,
    refuse_inputs_as_output,
)
from exporter.merging.shards import write_shards
from exporter.merging.stream import WrittenTensor
from exporter.progress import SILENT, Progress
from exporter.sources.adapter import open_adapter
from exporter.sources.checkpoint import open_checkpoint
from exporter.sources.hub import Source, resolve
from exporter.sources.snapshot import TOKENIZER

FORMULA = "W' = round(W + sum_k weight_k * scale_k * B_k A_k), accumulated in float32, rounded once"
# Where rounding keeps less of a delta than this share, the user is told.
SWALLOWED = 0.5
SPARE = 16 << 20  # free bytes beside the weights, for the small files
# Files that a loader takes for weights: none of an earlier checkpoint may stand beside the new ones.
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json", "pytorch_model.bin.index.json")


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
        _remove_partials(out, journal)
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
            _remove_partials(out, journal)
    return MergedCheckpoint(out, plan, section)


def _done(out: Path, request: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The manifest's account of this very merge, if `out` holds it."""
    manifest = _manifest(out)
    with suppress(OSError):  # an output that cannot be read is not done
        return manifest["stages"][STAGE] if manifest and is_done(out, manifest, request) else None
    return None


def _begin(out: Path, request: Mapping[str, Any], force: bool) -> Journal:
    """What a merge that was killed left to go on with. UsageError if `out` holds something else."""
    journal = Journal(out, request)
    refuse_foreign_directory(out, _manifest(out), force or journal.is_begun)
    return journal


def _manifest(out: Path) -> dict[str, Any] | None:
    """The manifest of `out`; one that cannot be read is a foreign file like others."""
    with suppress(InputRefused, OSError):
        return read_manifest(out)
    return None


def _tidy(out: Path) -> None:
    """Take away what a process that was killed just before its end left beside a finished merge."""
    if (out / LOCK).exists() or any(out.glob(".*.partial")):
        with suppress(ExporterError, OSError), lock_directory(out):
            _remove_partials(out, None)


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
        if len(changes) < sum(len(t.changes) or 1 for t in plan.changed if _is_of(t, adapter.file)):
            continue  # something else than plain LoRA: what it changes is seen when it is written
        if not any(down.any() and up.any() for down, up in map(read_factors, changes)):
            raise InputRefused(
                f"every factor B (or A) in {adapter.file} is zero, so merging would change nothing",
                expected="a trained adapter",
                todo="check that training ran and that the right checkpoint was saved",
            )


def _is_of(tensor: OutputTensor, file: Path) -> bool:
    return tensor.source.file == file or any(not isinstance(c, LowRank) or c.down.file == file for c in tensor.changes)


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
    section = _section(plan, layouts, request, options, shards, written)
    _publish(out, shards, small, section, journal)
    for name in section["swallowed"]:
        progress.note(f"{name}: rounding to {section['tensors'][name]['dtype']} swallowed more than half of the delta")
    return section


def _publish(
    out: Path,
    shards: Mapping[str, FinishedShard],
    small: Mapping[str, bytes],
    section: dict[str, Any],
    journal: Journal,
) -> None:
    """Old names go, the configuration first; new ones come, the configuration last: no loader takes what is between.

    Everything stands on the disk under partial names before that, the manifest too: the rest is renaming. `section`
    gets its "files".
    """
    for name, data in small.items():
        write_partial(out / name, data)
    section["files"] = {name: _describe_shard(_place(out / name), shard) for name, shard in shards.items()}
    section["files"] |= {name: describe_file(partial_path(out / name)) for name in small}
    write_partial(out / MANIFEST, manifest_bytes({STAGE: section}))
    _remove_outputs(out, journal)
    for name in [*shards, *sorted(small, key=lambda name: name == "config.json"), MANIFEST]:
        if name == MANIFEST or name == "config.json":
            sync_directory(out)
        _place(out / name).replace(out / name)
    sync_directory(out)
    journal.forget()


def _place(final: Path) -> Path:
    """Where a file stands before it is renamed; a shard may have its name from a run that was killed."""
    return partial_path(final) if partial_path(final).exists() else final


def _describe_shard(path: Path, shard: FinishedShard) -> dict[str, Any]:
    return {**stamp(path), "sha256": shard.proof.sha256 if shard.proof else None}


def _section(
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


def _remove_outputs(out: Path, journal: Journal) -> None:
    """Take away what an earlier run listed as its output, and every other file that a loader would take.

    The configuration goes first, so that nothing loads any more, and the manifest last: after a kill it still lists.
    """
    stages = (_manifest(out) or {"stages": {}})["stages"].values()
    old = {name for section in stages for name in section.get("files", {})} | TOKENIZER
    files = [path for path in out.iterdir() if path.is_file() or path.is_symlink()]
    files = [path for path in files if path.name in old or any(map(path.match, WEIGHTS))]
    (out / "config.json").unlink(missing_ok=True)
    sync_directory(out)
    for path in files:
        if not journal.keeps(path):
            path.unlink(missing_ok=True)
    (out / MANIFEST).unlink(missing_ok=True)


def _remove_partials(out: Path, journal: Journal | None) -> None:
    """What an interrupted run left, but for the shards it had finished."""
    for path in out.glob(".*.partial"):
        if path.is_file() and not (journal and journal.keeps(path)):
            path.unlink(missing_ok=True)
