"""`exporter merge`: from a base and adapters to a checkpoint that transformers loads, streamed and proven."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from exporter import prompts
from exporter.errors import InputRefused, UsageError
from exporter.files import (
    LOCK,
    lock_directory,
    partial_path,
    publish,
    removed_if_empty,
    require_free_space,
    write_atomically,
)
from exporter.manifest import MANIFEST, describe_file, file_is_unchanged, read_manifest, versions, write_stage
from exporter.merging.card import (
    config_bytes,
    generation_config_bytes,
    index_bytes,
    licence_of,
    model_card,
    shard_names,
)
from exporter.merging.layout import ALIGNMENT, ShardLayout, Slot, lay_out
from exporter.merging.plan import MergePlan, OutputTensor, plan_merge
from exporter.merging.proof import Probe, prove_shard
from exporter.merging.stream import WrittenTensor, read_factors, write_shard
from exporter.progress import SILENT, Progress
from exporter.sources.adapter import Adapter, open_adapter
from exporter.sources.checkpoint import open_checkpoint
from exporter.sources.hub import Source, resolve
from exporter.sources.tokenizer import build_tokenizer_json, tokenizer_files

STAGE = "merge"
FORMULA = "W' = round(W + sum_k weight_k * scale_k * B_k A_k), accumulated in float32, rounded once"


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
    shard_size: int = 5_000_000_000,
    memory: int = 1_000_000_000,
    proof: Literal["full", "none"] = "full",
    template: str | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> MergedCheckpoint:
    """Merge one or more adapters into `base` and write a transformers checkpoint to `out`.

    base, adapter: a directory or a hub id `owner/name[@revision]`. weight: one per adapter, default 1.
    dtype: "auto" keeps each tensor's stored type. shard_size, memory: bytes. template: a chat template's name or text;
    default: the adapter's, else the base's, else none. force: replace what `out` holds.
    Raises UsageError, InputRefused or EnvironmentLacking; then `out` is as it was.
    """
    adapters = [adapter] if isinstance(adapter, str | Path) else list(adapter)
    base_source = resolve(base, kind="base", progress=progress)
    sources = [resolve(one, kind="adapter", progress=progress) for one in adapters]
    return merge_sources(
        base_source,
        sources,
        Path(out),
        weights=weight,
        dtype=dtype,
        shard_size=shard_size,
        memory=memory,
        proof=proof,
        template=template,
        force=force,
        progress=progress,
    )


def merge_sources(
    base: Source,
    adapters: Sequence[Source],
    out: Path,
    *,
    weights: Sequence[float],
    dtype: str,
    shard_size: int,
    memory: int,
    proof: Literal["full", "none"],
    template: str | None,
    force: bool,
    progress: Progress,
) -> MergedCheckpoint:
    """`merge` for sources that are already on this machine."""
    plan = plan_sources(base, adapters, weights, dtype=dtype, shard_size=shard_size)
    refuse_zero_factors(plan)
    layouts = [lay_out(Slot(t.name, t.dtype, t.shape, t.nbytes) for t in shard) for shard in plan.shards]
    request = describe_request(base, adapters, plan, dtype=dtype, shard_size=shard_size, template=template)
    done = read_manifest(out)
    if done is not None and not force and is_done(out, done, request):
        return MergedCheckpoint(out, plan, done["stages"][STAGE], skipped=True)
    refuse_foreign_directory(out, done, force)
    require_free_space(out, sum(layout.size for layout in layouts) + (16 << 20), "the merged checkpoint")
    with removed_if_empty(out), lock_directory(out):
        try:
            section = _write(out, plan, layouts, base, adapters, request, memory, proof, template, progress)
        except BaseException:
            _remove_partials(out)
            raise
    return MergedCheckpoint(out, plan, section)


def plan_sources(
    base: Source, adapters: Sequence[Source], weights: Sequence[float], *, dtype: str, shard_size: int
) -> MergePlan:
    """The plan of a merge, from headers alone."""
    if weights and len(weights) != len(adapters):
        raise UsageError(f"{len(weights)} weights for {len(adapters)} adapters", expected="one --weight per --adapter")
    opened = [open_adapter(source.directory) for source in adapters]
    pairs = list(zip(opened, weights or [1.0] * len(opened), strict=True))
    return plan_merge(open_checkpoint(base.directory), pairs, dtype=dtype, shard_size=shard_size)


def refuse_zero_factors(plan: MergePlan) -> None:
    """An adapter whose B is zero everywhere changes nothing: it was never trained, or it was saved wrongly."""
    for adapter, _ in plan.adapters:
        live = 0
        for tensor in plan.changed:
            for weighted in tensor.deltas:
                if adapter.factors.get(weighted.factors.module) is weighted.factors:
                    down, up = read_factors(weighted)
                    live += bool(down.any()) and bool(up.any())
        if not live:
            raise InputRefused(
                f"every factor B (or A) in {adapter.file} is zero, so merging would change nothing",
                expected="a trained adapter",
                todo="check that training ran and that the right checkpoint was saved",
            )


def describe_request(
    base: Source, adapters: Sequence[Source], plan: MergePlan, *, dtype: str, shard_size: int, template: str | None
) -> dict[str, Any]:
    """What was asked for: equal requests on unchanged inputs give equal outputs."""
    return {
        "base": {**_origin(base), "files": {f.name: _stamp(f) for f in plan.base.files}},
        "adapters": [
            {**_origin(source), "weight": weight, "files": {adapter.file.name: _stamp(adapter.file)}}
            for source, (adapter, weight) in zip(adapters, plan.adapters, strict=True)
        ],
        "dtype": dtype,
        "shard_size": shard_size,
        "template": template,
    }


def _origin(source: Source) -> dict[str, Any]:
    return {"source": source.id or str(source.directory), "revision": source.revision, "commit": source.commit}


def _stamp(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino}


def is_done(out: Path, manifest: Mapping[str, Any], request: Mapping[str, Any]) -> bool:
    """True if `out` holds this very merge and every file of it is as it was written."""
    section = manifest["stages"].get(STAGE)
    if not section or section.get("request") != request:
        return False
    return all(file_is_unchanged(out / name, entry) for name, entry in section["files"].items())


def refuse_foreign_directory(out: Path, manifest: Mapping[str, Any] | None, force: bool) -> None:
    if force or not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"{out} is a file", expected="a directory", todo="choose another --out")
    if manifest is None and (out / LOCK).exists():
        return  # a merge was killed here: what it left is not a finished checkpoint
    content = [p.name for p in out.iterdir() if p.name != LOCK and not p.name.endswith(".partial")]
    if content:
        what = "another merge or a damaged one" if manifest else f"something else ({sorted(content)[0]})"
        raise UsageError(
            f"{out} holds {what}",
            expected="an empty directory or this very merge",
            todo="choose another --out, or --force",
        )


def _write(
    out: Path,
    plan: MergePlan,
    layouts: Sequence[ShardLayout],
    base: Source,
    adapters: Sequence[Source],
    request: Mapping[str, Any],
    memory: int,
    proof: Literal["full", "none"],
    template: str | None,
    progress: Progress,
) -> dict[str, Any]:
    _remove_partials(out)
    names = shard_names(len(plan.shards))
    digests: dict[str, str] = {}
    written: dict[str, WrittenTensor] = {}
    with progress.task("merging", plan.nbytes, "B") as task:
        for name, layout, shard in zip(names, layouts, plan.shards, strict=True):
            tensors, digests[name] = write_shard(partial_path(out / name), layout, shard, memory, task)
            written |= {tensor.name: tensor for tensor in tensors}
    probes: list[Probe] = []
    if proof == "full":
        with progress.task("proving", plan.nbytes, "B") as task:
            for name, shard in zip(names, plan.shards, strict=True):
                probes += prove_shard(partial_path(out / name), shard, written, memory, task)
    small = _small_files(plan, base, adapters, request["dtype"], template, progress)
    # The old manifest goes first: from here on the directory claims nothing until the new one stands.
    _remove_outputs(out)
    for name in names:
        publish(partial_path(out / name), out / name)
    for name, data in small.items():
        write_atomically(out / name, data)
    section = {
        "request": dict(request),
        "formula": FORMULA,
        "scales": {t.name: [w.scale for w in t.deltas] for t in plan.changed},
        "dropped": dict(plan.dropped),
        "tied": dict(plan.tied),
        "memory": memory,
        "versions": versions(),
        "proof": [{"name": p.name, "error": p.error, "allowed": p.allowed, "delta": p.delta} for p in probes],
        "files": {name: describe_file(out / name, digests.get(name)) for name in [*names, *small]},
        "tensors": {t.name: _tensor_entry(t, written[t.name]) for t in plan.tensors},
        "unaligned": unaligned(layouts),
    }
    write_stage(out, STAGE, section)
    for tensor in plan.changed:
        if written[tensor.name].rounding_norm > 0.5 * written[tensor.name].delta_norm:
            progress.note(f"{tensor.name}: rounding to {tensor.dtype} swallowed more than half of the delta")
    return section


def _tensor_entry(tensor: OutputTensor, written: WrittenTensor) -> dict[str, Any]:
    entry: dict[str, Any] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "sha256": written.sha256}
    if not tensor.is_copied:
        entry["source_sha256"] = written.source_sha256
    if tensor.deltas:
        entry["delta_norm"] = written.delta_norm
        entry["rounding_norm"] = written.rounding_norm
    return entry


def unaligned(layouts: Sequence[ShardLayout]) -> list[str]:
    """Tensors of a page or more that start elsewhere than at a multiple of 4096."""
    found = []
    for layout in layouts:
        ends = [*(layout.offsets[name] for name in layout.order[1:]), layout.size]
        for name, end in zip(layout.order, ends, strict=True):
            start = layout.offsets[name]
            if start % ALIGNMENT and end - start >= ALIGNMENT:
                found.append(name)
    return found


def _small_files(
    plan: MergePlan,
    base: Source,
    adapters: Sequence[Source],
    dtype: str,
    template: str | None,
    progress: Progress,
) -> dict[str, bytes]:
    """Everything beside the weights, by file name."""
    files = {
        "config.json": config_bytes(plan, dtype),
        "generation_config.json": generation_config_bytes(base.directory),
    }
    if len(plan.shards) > 1:
        files["model.safetensors.index.json"] = index_bytes(plan)
    adapter_directories = [source.directory for source in adapters]
    chosen = tokenizer_files(base.directory, adapter_directories)
    for path in chosen.files:
        files[path.name] = path.read_bytes()
    if "tokenizer.json" not in files:
        progress.note(f"{chosen.directory} has no tokenizer.json: it is built from its vocabulary")
        files["tokenizer.json"] = build_tokenizer_json(chosen.directory)
    text = choose_template(template, [*adapter_directories, base.directory])
    if text is not None:
        files["chat_template.jinja"] = text.encode()
    files["README.md"] = model_card(
        base.id or base.directory.name,
        licence_of(base.directory),
        [_card_row(source, *pair) for source, pair in zip(adapters, plan.adapters, strict=True)],
        plan.config_dtype,
        len(plan.changed),
    )
    return files


def _card_row(source: Source, adapter: Adapter, weight: float) -> tuple[str, str, float, int, float]:
    name = source.id or source.directory.name
    return name, licence_of(source.directory), weight, adapter.config["r"], adapter.config["lora_alpha"]


def choose_template(template: str | None, directories: Sequence[Path]) -> str | None:
    """The named or given template, else the first that a directory has, else None: it is never invented."""
    if template is not None:
        if template in prompts.TEMPLATES:
            return prompts.TEMPLATES[template]
        if "{" not in template:
            raise UsageError(f"no chat template is named {template!r}", expected=", ".join(prompts.TEMPLATES))
        return template
    return next((text for directory in directories if (text := prompts.chat_template(directory)) is not None), None)


def _remove_outputs(out: Path) -> None:
    """Take away what an earlier run listed as its output, and the manifest before it."""
    manifest = read_manifest(out)
    (out / MANIFEST).unlink(missing_ok=True)
    for section in (manifest or {"stages": {}})["stages"].values():
        for name in section.get("files", {}):
            if Path(name).name == name:
                (out / name).unlink(missing_ok=True)


def _remove_partials(out: Path) -> None:
    for path in out.glob(".*.partial"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
