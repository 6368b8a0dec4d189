"""`exporter unmerge`: the base's bytes again, from a merged checkpoint and its adapter, or from the base by hash.

W' - delta, rounded to the base's type, is W unless W + delta crossed into a binade of coarser steps (or fell on a tie):
then W' no longer tells W's last bit. So a tensor counts as restored only if its SHA-256 is the one that the merge noted
of the base; those that rounding has put out of reach are taken from the base, by the same digest.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exporter.errors import ExporterError, InputRefused, UsageError
from exporter.files import (
    LOCK,
    disk_errors,
    lock_directory,
    publish,
    removed_if_empty,
    require_free_space,
    write_atomically,
)
from exporter.manifest import describe_file, file_is_unchanged, read_manifest, stamp, versions, write_stage
from exporter.merging.account import is_account
from exporter.merging.card import index_bytes
from exporter.merging.changes import AddVector, LowRank
from exporter.merging.journal import FinishedShard, Journal
from exporter.merging.layout import Slot, lay_out
from exporter.merging.output import OutputTensor
from exporter.merging.plan import MergePlan, plan_merge, split_shards
from exporter.merging.publish import place_of, remove_partials
from exporter.merging.request import STAGE as MERGE
from exporter.merging.shards import write_shards
from exporter.progress import SILENT, Progress
from exporter.sources.adapter import open_adapter
from exporter.sources.checkpoint import Checkpoint, open_checkpoint
from exporter.sources.hub import resolve
from exporter.sources.own_files import require_own_files
from exporter.sources.unchanged import require_unchanged, watch, watch_all

STAGE = "unmerge"


@dataclass(frozen=True, slots=True)
class UnmergedCheckpoint:
    """computed: tensors restored by arithmetic. from_base: those taken from the base. All have their digests."""

    directory: Path
    computed: tuple[str, ...]
    from_base: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "directory": str(self.directory),
            "computed": list(self.computed),
            "from_base": list(self.from_base),
        }


def unmerge(
    merged: str | Path,
    *,
    adapter: str | Path | Sequence[str | Path],
    out: str | Path,
    base: str | Path | None = None,
    memory: int = 1_000_000_000,
    progress: Progress = SILENT,
) -> UnmergedCheckpoint:
    """Write to `out` the weights that `merged` was made from, every tensor checked against the digest in its manifest.

    adapter: those of the merge, in its order. base: where to take tensors from that arithmetic cannot restore.
    One that was killed goes on. Raises InputRefused where a tensor cannot be restored, UsageError if `out` holds
    something else; then nothing is written.
    """
    directory, target = Path(merged), Path(out)
    section = _merge_section(directory)
    adapters = [adapter] if isinstance(adapter, str | Path) else list(adapter)
    checkpoint = open_checkpoint(directory)
    original = open_checkpoint(resolve(base, kind="base", progress=progress).directory) if base is not None else None
    sources = [resolve(one, kind="adapter", progress=progress).directory for one in adapters]
    beside = watch_all([*sources, *([original.directory] if original else [])])
    watched = watch(checkpoint.files) | beside
    plan = _plan(checkpoint, original, sources, section)
    if _is_done(target, checkpoint.directory, section):
        with suppress(ExporterError, OSError), lock_directory(target):
            remove_partials(target, None)
        return _unmerged(target, plan)
    inputs = {str(path): stamp for path, stamp in beside.items()}
    request = {"unmerge": str(directory), "tensors": section["tensors"], "inputs": inputs}
    _refuse_foreign_directory(target, Journal(target, request))
    layouts = [lay_out(Slot(t.name, t.dtype, t.shape, t.nbytes) for t in shard) for shard in plan.shards]
    with removed_if_empty(target), lock_directory(target), disk_errors(target):
        journal = Journal(target, request)
        remove_partials(target, journal)
        require_free_space(target, sum(layout.size for layout in layouts) - journal.nbytes, "the unmerged checkpoint")
        try:
            shards = write_shards(
                target,
                plan,
                layouts,
                journal,
                memory=memory,
                proven=True,
                check_inputs=lambda: require_unchanged(watched),
                progress=progress,
            )
            _check_digests(plan, shards, section)
        except InputRefused:  # anything else, such as a full disk, leaves finished shards to go on from
            journal.forget()
            raise
        finally:
            remove_partials(target, journal)
        return _publish(target, plan, shards, journal, section, (original or checkpoint).directory)


def _is_done(target: Path, merged: Path, section: Mapping[str, Any]) -> bool:
    """True if `target` holds what this merge was made from, and every file of it is as it was written."""
    manifest = read_manifest(target) if target.is_dir() else None
    done = (manifest or {"stages": {}})["stages"].get(STAGE)
    if not done or done.get("merged") != str(merged):
        return False
    wanted = {name: entry.get("source_sha256", entry["sha256"]) for name, entry in section["tensors"].items()}
    same = {name: entry["sha256"] for name, entry in done["tensors"].items()} == wanted
    return same and all(file_is_unchanged(target / name, entry) for name, entry in done["files"].items())


def _refuse_foreign_directory(target: Path, journal: Journal) -> None:
    """UsageError if `target` holds anything but what an unmerge that was killed has left."""
    if not target.exists():
        return
    names = [path.name for path in target.iterdir()] if target.is_dir() else [target.name]
    content = [name for name in names if name != LOCK and not name.endswith(".partial")]
    if content and not journal.is_begun:
        raise UsageError(f"{target} is not an empty directory", expected="one to write to", todo="choose another --out")


def _merge_section(directory: Path) -> Mapping[str, Any]:
    if directory.is_dir():
        require_own_files(directory)
    manifest = read_manifest(directory) if directory.is_dir() else None
    section = (manifest or {"stages": {}})["stages"].get(MERGE)
    if not is_account(section) or not section["proof"]:
        raise InputRefused(
            f"{directory} has no account of a proven merge",
            expected="a directory that exporter merge wrote, with the default --proof full",
            todo="take the base itself",
        )
    return section


def _plan(
    checkpoint: Checkpoint,
    original: Checkpoint | None,
    adapters: Sequence[Path],
    section: Mapping[str, Any],
) -> MergePlan:
    """The merge's own plan over the merged weights, with every delta taken away instead of added."""
    weights = [entry["weight"] for entry in section["request"]["adapters"]]
    if len(adapters) != len(weights):
        raise UsageError(f"{len(adapters)} adapters", expected=f"the {len(weights)} of the merge, in its order")
    opened = [(open_adapter(one), weight) for one, weight in zip(adapters, weights, strict=True)]
    forward = plan_merge(checkpoint, opened)
    tensors = [_reverse(tensor, original, section) for tensor in forward.tensors]
    return replace(forward, shards=split_shards(tensors, section["request"]["shard_size"]), vocab_size=None)


def _reverse(tensor: OutputTensor, original: Checkpoint | None, section: Mapping[str, Any]) -> OutputTensor:
    entry = section["tensors"].get(tensor.name, {})
    if not tensor.is_changed and "source_sha256" not in entry:
        return tensor
    known = original.tensors.get(entry.get("source", tensor.name)) if original else None
    if known is not None:
        return OutputTensor(tensor.name, known.dtype, known, known)
    changes = [_negate(change) for change in tensor.changes]
    additive = [change for change in changes if change is not None]
    if len(additive) != len(tensor.changes) or tensor.source is not tensor.base or "source_dtype" not in entry:
        raise _unreachable([tensor.name], "its method cannot be undone by a subtraction")
    return replace(tensor, dtype=entry["source_dtype"], changes=tuple(additive))


def _negate(change: object) -> LowRank | AddVector | None:
    if isinstance(change, LowRank | AddVector):
        return replace(change, scale=-change.scale)
    return None


def _check_digests(plan: MergePlan, shards: Mapping[str, FinishedShard], section: Mapping[str, Any]) -> None:
    lost = []
    for shard in shards.values():
        for written in shard.written:
            entry = section["tensors"].get(written.name, {})
            if written.sha256 != entry.get("source_sha256", entry.get("sha256")):
                lost.append(written.name)
    if lost:
        raise _unreachable(lost, "rounding has put some of its last bits out of reach, or the adapter is another one")


def _unreachable(names: list[str], why: str) -> InputRefused:
    return InputRefused(
        f"{names[0]!r}" + (f" and {len(names) - 1} more tensors" if names[1:] else "") + f" cannot be restored: {why}",
        expected="tensors whose digest is the one that the merge noted of the base",
        todo="give the base too: --base BASE, from which they are taken by their digest",
    )


def _publish(
    out: Path,
    plan: MergePlan,
    shards: Mapping[str, FinishedShard],
    journal: Journal,
    section: Mapping[str, Any],
    configuration: Path,
) -> UnmergedCheckpoint:
    for name in shards:
        if (place := place_of(out / name)) != out / name:  # else it has its name from a run that was killed
            publish(place, out / name)
    small = {"model.safetensors.index.json": index_bytes(plan)} if len(shards) > 1 else {}
    source = plan.base.directory
    for name in section["files"]:
        path = source / name
        if not name.endswith((".safetensors", ".index.json")) and name not in ("README.md", "config.json"):
            small[name] = path.read_bytes()
    small["config.json"] = (configuration / "config.json").read_bytes()
    for name, data in small.items():
        write_atomically(out / name, data)
    files = {name: {**stamp(out / name), "sha256": shard.proof.sha256} for name, shard in shards.items() if shard.proof}
    write_stage(
        out,
        STAGE,
        {
            "merged": str(source),
            "versions": versions(),
            "files": {**files, **{name: describe_file(out / name) for name in small}},
            "tensors": {w.name: {"sha256": w.sha256} for shard in shards.values() for w in shard.written},
        },
    )
    journal.forget()
    return _unmerged(out, plan)


def _unmerged(out: Path, plan: MergePlan) -> UnmergedCheckpoint:
    computed = tuple(t.name for t in plan.tensors if t.changes)
    return UnmergedCheckpoint(
        out, computed, tuple(t.name for t in plan.tensors if t.source.file.parent != plan.base.directory)
    )
