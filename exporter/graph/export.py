"""From a checkpoint to bundles: a graph beside its weights, or a directory of its own for another precision."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from exporter.errors import InputRefused, UsageError
from exporter.files import disk_errors, human_bytes, lock_directory, removed_if_empty, write_atomically
from exporter.graph.adapters import (
    SUFFIX,
    TEMPLATE_SUFFIX,
    RuntimeAdapter,
    adapted_modules,
    adapter_facts,
    write_adapters,
)
from exporter.graph.architectures import build_model, read_decoder
from exporter.graph.builder import OPSET, exporter_version, is_ours, serialize
from exporter.graph.bundle import (
    GRAPHS,
    STAGE,
    Bundle,
    bundle_name,
    bundles_in,
    describe_known,
    describe_unread,
    known_sha256,
)
from exporter.graph.decoder import MATRICES, Decoder, decoder_weights
from exporter.graph.deployment import DEPLOYMENTS, write_deployment
from exporter.graph.finite import require_finite
from exporter.graph.genai_config import genai_config
from exporter.graph.quantize import BLOCK, BLOCKS
from exporter.graph.quantized_file import Stored, bits_per_weight, write_weights
from exporter.graph.weights import WEIGHTS, Weight, open_weights
from exporter.manifest import describe_file, file_is_unchanged, read_manifest, versions, write_stage
from exporter.progress import SILENT, Progress
from exporter.sources.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from exporter.sources.tokenizer import TOKENIZER_JSON, build_tokenizer_json
from exporter.sources.unchanged import require_unchanged, watch

PRECISIONS = ("native", "fp32", "fp16", "int8", "int4", "int8-exact")
BUILDERS = ("native", "optimum")
GENAI_CONFIG = "genai_config.json"
# MatMulNBits quantizes its activations to int8 at level 4; without it 4-bit decoding on a CPU is about 2.3x slower.
ACCURACY_LEVEL = {"cpu": 4, "cuda": 0}
# Bytes of unhashed weights that a native export still reads: about a second.
READ_AT_ONCE = 2 << 30
# What makes a bundle complete alone: copied byte for byte where the checkpoint has it.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "README.md",
)


def export(
    checkpoint: Path | str | None = None,
    *,
    base: Path | str | None = None,
    adapter: Path | str | Sequence[Path | str] = (),
    adapters: str | None = None,
    precision: Sequence[str] = ("native",),
    target: Sequence[str] = ("cpu",),
    builder: str = "native",
    block_size: int = BLOCK,
    deployment: Sequence[str] = (),
    out: Path | str | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> list[Bundle]:
    """Write one bundle for each precision and target.

    native points into the checkpoint's own safetensors and lies in its directory; the others stand alone in
    `<out or the checkpoint's parent>/<precision>[-cuda]/`. In place of a checkpoint, `base` and `adapter` with
    `adapters` "separate" give a graph over the base in `out`, and adapters that are chosen at run time; with precision
    "int8-exact" they give the codes of 8-bit loading with the adapters added beside them.
    block_size: weights that share a scale in int8 and int4, one of BLOCKS: larger ones compute faster, with more error.
    deployment: names of DEPLOYMENTS, files that run the bundle elsewhere, in its directory `deployment`.
    Raises UsageError (unknown name, foreign output without `force`), InputRefused (a checkpoint that cannot be
    honoured), EnvironmentLacking (disk, optimum).
    """
    if deployment:
        _check_names("deployment", deployment, tuple(DEPLOYMENTS))
    bundles = _export_all(
        checkpoint, base, adapter, adapters, precision, target, builder, block_size, out, force=force, progress=progress
    )
    for bundle in bundles:
        write_deployment(bundle, deployment)
    return bundles


def _export_all(
    checkpoint: Path | str | None,
    base: Path | str | None,
    adapter: Path | str | Sequence[Path | str],
    adapters: str | None,
    precision: Sequence[str],
    target: Sequence[str],
    builder: str,
    block_size: int,
    out: Path | str | None,
    *,
    force: bool,
    progress: Progress,
) -> list[Bundle]:
    out = None if out is None else Path(out)
    _check_names("precision", precision, PRECISIONS)
    _check_names("target", target, tuple(GRAPHS))
    _check_names("builder", [builder], BUILDERS)
    if block_size not in BLOCKS:
        raise UsageError(f"block size {block_size}", expected="one of " + ", ".join(map(str, BLOCKS)))
    if adapters is not None:
        _check_names("adapters", [adapters], ("separate",))
        if checkpoint is not None or base is None or out is None or len(precision) != 1 or builder != "native":
            raise UsageError(
                "--adapters separate with other arguments than it takes",
                expected="--base, --adapter, --out, at most one --precision, the native builder and no CHECKPOINT",
            )
        from exporter.graph.separate import export_separate  # it builds on this file

        given = [adapter] if isinstance(adapter, str | Path) else list(adapter)
        return [
            export_separate(
                base,
                given,
                out,
                precision=precision[0],
                target=one,
                block_size=block_size,
                force=force,
                progress=progress,
            )
            for one in dict.fromkeys(target)
        ]
    if "int8-exact" in precision:
        if checkpoint is not None or base is None or out is None or len(precision) != 1 or builder != "native":
            raise UsageError(
                "--precision int8-exact with other arguments than it takes",
                expected="--base, --adapter, --out, no other --precision, the native builder and no CHECKPOINT",
            )
        from exporter.graph.int8_exact import export_int8_exact  # it builds on this file

        given = [adapter] if isinstance(adapter, str | Path) else list(adapter)
        return [
            export_int8_exact(base, given, out, target=one, force=force, progress=progress)
            for one in dict.fromkeys(target)
        ]
    if checkpoint is None or base is not None or adapter:
        raise UsageError(
            "no checkpoint to export" if checkpoint is None else "a checkpoint beside --base or --adapter",
            expected="CHECKPOINT alone, or --base and --adapter with --adapters separate or --precision int8-exact",
        )
    checkpoint = Path(checkpoint)
    opened = open_checkpoint(checkpoint)
    if builder == "optimum":
        from exporter.graph.optimum_builder import export_with_optimum  # a builder that needs an optional dependency

        return [export_with_optimum(opened, out or checkpoint.parent, force=force, progress=progress)]
    read_decoder(opened.config)  # before anything is written
    return [
        _export_one(opened, one_precision, one_target, out, block_size, force=force, progress=progress)
        for one_precision in dict.fromkeys(precision)
        for one_target in dict.fromkeys(target)
    ]


def _check_names(kind: str, given: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown or not given:
        raise UsageError(f"{kind} {', '.join(unknown) or '(none)'}", expected="one of " + ", ".join(known))


def _export_one(
    checkpoint: Checkpoint,
    precision: str,
    target: str,
    out: Path | None,
    block_size: int,
    *,
    force: bool,
    progress: Progress,
) -> Bundle:
    if precision == "native" and can_be_pointed_into(checkpoint):
        return export_native(checkpoint.directory, target, force=force, progress=progress)
    if precision == "native" and out is None:
        raise InputRefused(
            f"{checkpoint.files[0].name} in {checkpoint.directory} cannot be pointed into",
            expected="model*.safetensors as regular files (a link is rejected by ONNX's external data rules)",
            todo="give --out DIR to stream the weights into a file there, or make the checkpoint with exporter merge",
        )
    directory = (out or checkpoint.directory.parent) / bundle_name(precision, target)
    return export_converted(
        checkpoint.directory, directory, precision, target, block_size=block_size, force=force, progress=progress
    )


def can_be_pointed_into(checkpoint: Checkpoint) -> bool:
    """True for safetensors files that are no links: what ONNX's external data may lie in."""
    return all(file.suffix == ".safetensors" and not file.is_symlink() for file in checkpoint.files)


def export_native(
    checkpoint_dir: Path,
    target: str,
    *,
    adapters: Sequence[RuntimeAdapter] = (),
    force: bool = False,
    progress: Progress = SILENT,
) -> Bundle:
    """A graph in the checkpoint's directory over its own safetensors: no weight is copied or converted.

    Files that no stage of ours has hashed are read once, for their hash and for values that are not finite; beyond
    READ_AT_ONCE they are not: their entries in the manifest have no hash, and a changed stamp is refused at load.
    """
    checkpoint = open_checkpoint(checkpoint_dir)
    decoder = read_decoder(checkpoint.config)
    directory = checkpoint.directory
    bundle = Bundle(directory, "native", target, directory / GRAPHS[target])
    with lock_directory(directory), disk_errors(directory):
        watched = watch(checkpoint.files)
        manifest = read_manifest(directory)
        _refuse_foreign(bundle, manifest, force=force)
        _refuse_foreign_adapters(bundle, manifest, adapters, force=force)
        merged = _merge_outputs_hold(directory, manifest)
        unseen = [file for file in checkpoint.files if known_sha256(file, manifest) is None]
        if (size := sum(file.stat().st_size for file in unseen)) > READ_AT_ONCE:
            progress.note(
                f"{human_bytes(size)} of weights are not read: the manifest records their sizes, times and headers, "
                "but no hashes. `exporter verify` reads them; after copying the directory, export again"
            )
            weights = {file.name: describe_unread(file, manifest) for file in checkpoint.files}
        else:
            require_finite(info for info in checkpoint.tensors.values() if info.file in unseen)
            weights = {file.name: describe_known(file, manifest) for file in checkpoint.files}
        require_unchanged(watched)
        _write_graph(bundle, decoder, checkpoint.tensors, checkpoint.config, adapters)
        facts = {"provenance": "merge" if merged else "unknown"} | adapter_facts(adapters)
        section = _section(bundle, weights, facts)
        section["files"] |= write_adapters(directory, adapters)
        _publish_section(bundle, section)
    return bundle


def export_converted(
    checkpoint_dir: Path,
    directory: Path,
    precision: str,
    target: str,
    *,
    block_size: int = BLOCK,
    adapters: Sequence[RuntimeAdapter] = (),
    force: bool = False,
    progress: Progress = SILENT,
) -> Bundle:
    """A bundle that is complete alone: weights streamed into `directory`/weights.safetensors in `precision`."""
    checkpoint = open_checkpoint(checkpoint_dir)
    bundle = Bundle(directory, precision, target, directory / GRAPHS[target])
    stored = _storage(read_decoder(checkpoint.config), checkpoint, precision, block_size)
    manifest = read_manifest(checkpoint.directory)
    facts = {"provenance": "merge" if _merge_outputs_hold(checkpoint.directory, manifest) else "unknown"}
    facts |= _merged_onto(manifest)
    return write_bundle(bundle, checkpoint, stored, facts, adapters=adapters, force=force, progress=progress)


def write_bundle(
    bundle: Bundle,
    checkpoint: Checkpoint,
    stored: Mapping[str, Stored],
    facts: Mapping[str, Any],
    *,
    extra: Mapping[str, torch.Tensor] | None = None,
    small: Mapping[str, bytes] | None = None,
    adapters: Sequence[RuntimeAdapter] = (),
    force: bool = False,
    progress: Progress = SILENT,
) -> Bundle:
    """Write `bundle` whole: weights, graph, small files, manifest.

    stored: by checkpoint name. extra: tensors that go into the weights as they are. small: files beside the weights, by
    default copies of the checkpoint's. facts: of the manifest's section. Raises as `write_weights`, and UsageError.
    """
    directory = bundle.directory
    manifest = read_manifest(checkpoint.directory)
    _refuse_foreign_directory(directory, bundle.stage, force=force)
    with removed_if_empty(directory), lock_directory(directory), disk_errors(directory):
        small = _companions(checkpoint.directory) if small is None else small  # first: they may be refused
        sources = {file.name: describe_known(file, manifest)["sha256"] for file in checkpoint.files}
        digests = write_weights(directory / WEIGHTS, stored, progress, extra=extra)
        for name, data in small.items():
            write_atomically(directory / name, data)
        decoder = read_decoder(checkpoint.config)
        own = decoder_weights(decoder, open_weights(directory / WEIGHTS))
        _write_graph(bundle, decoder, own, checkpoint.config, adapters)
        facts = {**facts, "source": sources, "tensors": digests} | adapter_facts(adapters)
        if blocks := {one.block for one in stored.values() if one.bits}:
            matrices = [stored[one.name] for short, one in own.items() if decoder.parameters[short].kind in MATRICES]
            bits = {"matrices": bits_per_weight(matrices), "all": bits_per_weight(stored.values())}
            facts |= {"block": min(blocks), "bits_per_weight": bits, "accuracy_level": ACCURACY_LEVEL[bundle.target]}
        section = _section(bundle, {WEIGHTS: describe_file(directory / WEIGHTS)}, facts)
        section["files"] |= {name: describe_file(directory / name) for name in small}
        section["files"] |= write_adapters(directory, adapters)
        _publish_section(bundle, section)
    return bundle


def export_quantized(
    checkpoint_dir: Path, out: Path, bits: int, target: str, *, force: bool = False, progress: Progress = SILENT
) -> Bundle:
    """MatMulNBits in `out`; `bits` 8 or 4 (embedding and head stay at 8: at 4 they cost most of the quality)."""
    return export_converted(checkpoint_dir, out, f"int{bits}", target, force=force, progress=progress)


def _storage(decoder: Decoder, checkpoint: Checkpoint, precision: str, block: int) -> dict[str, Stored]:
    """How each parameter is stored in a bundle of `precision`, by checkpoint name; unused tensors are left out."""
    fixed = {"fp32": "F32", "fp16": "F16"}
    stored: dict[str, Stored] = {}
    for short, info in decoder_weights(decoder, checkpoint.tensors).items():
        assert isinstance(info, TensorInfo), short  # a checkpoint holds nothing quantized
        kind = decoder.parameters[short].kind
        if precision in ("int8", "int4") and kind in ("tokens", "head"):
            stored[info.name] = Stored(info, "U8", 8, block=block)  # at 4 bits they would cost most of the quality
        elif precision in ("int8", "int4") and kind in MATRICES:
            stored[info.name] = Stored(info, "U8", int(precision[3:]), transposed=kind == "conv1d", block=block)
        else:
            stored[info.name] = Stored(info, fixed.get(precision, info.dtype))
    return stored


def _write_graph(
    bundle: Bundle,
    decoder: Decoder,
    weights: Mapping[str, Weight],
    raw_config: dict[str, Any],
    adapters: Sequence[RuntimeAdapter] = (),
) -> None:
    metadata = {
        "exporter.version": exporter_version(),
        "exporter.precision": bundle.precision,
        "exporter.target": bundle.target,
    }
    level = ACCURACY_LEVEL[bundle.target]
    adapted = adapted_modules(adapters)
    model = build_model(decoder, weights, bundle.target, metadata, accuracy_level=level, adapted=adapted)
    write_atomically(bundle.graph, serialize(model))
    if _owns_genai_config(bundle):
        content = genai_config(bundle.directory, raw_config, decoder.sizes, bundle.graph.name, bundle.target)
        write_atomically(bundle.directory / GENAI_CONFIG, content)


def _owns_genai_config(bundle: Bundle) -> bool:
    """genai reads one configuration a directory: with graphs for both targets it names the one that runs anywhere."""
    return bundle.target == "cpu" or not (bundle.directory / GRAPHS["cpu"]).exists()


def _publish_section(bundle: Bundle, section: dict[str, Any]) -> None:
    """Write the manifest's section; a file that it took over is no longer listed under another target."""
    earlier = (read_manifest(bundle.directory) or {"stages": {}})["stages"].get(bundle.stage, {})
    for other in bundles_in(bundle.directory):
        listed = other.section
        if other.stage != bundle.stage and GENAI_CONFIG in section["files"] and GENAI_CONFIG in listed["files"]:
            del listed["files"][GENAI_CONFIG]
            write_stage(bundle.directory, other.stage, listed)
    write_stage(bundle.directory, bundle.stage, section)
    _remove_dropped_adapters(bundle.directory, earlier.get("files", {}))


def _remove_dropped_adapters(directory: Path, earlier: Mapping[str, dict[str, Any]]) -> None:
    """Adapters and templates that the export before wrote, unchanged since, and that no section lists any more."""
    stages = (read_manifest(directory) or {"stages": {}})["stages"]
    listed = {name for section in stages.values() for name in section.get("files", {})}
    for name, entry in earlier.items():
        path = directory / name
        dropped = name not in listed and name.endswith((SUFFIX, TEMPLATE_SUFFIX)) and path.parent == directory
        if dropped and file_is_unchanged(path, entry):
            path.unlink()


def _section(bundle: Bundle, weights: dict[str, dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    own = [bundle.graph.name, *([GENAI_CONFIG] if _owns_genai_config(bundle) else [])]
    files = {name: describe_file(bundle.directory / name) for name in own}
    return {
        "precision": bundle.precision,
        "target": bundle.target,
        "graph": bundle.graph.name,
        "weights": sorted(weights),
        "files": files | weights,
        "builder": "native",
        "opset": OPSET,
        "versions": versions(),
    } | facts


def _merged_onto(manifest: dict[str, Any] | None) -> dict[str, Any]:
    """What the merge added to, which `verify` of a bundle that stands alone must know; empty without a merge."""
    request = ((manifest or {"stages": {}})["stages"].get("merge") or {}).get("request") or {}
    return {"onto": request["onto"]} if "onto" in request else {}


def _merge_outputs_hold(directory: Path, manifest: dict[str, Any] | None) -> bool:
    """True if the weights are those that the merge stage wrote."""
    files = ((manifest or {"stages": {}})["stages"].get("merge") or {}).get("files") or {}
    weights = {name: entry for name, entry in files.items() if name.endswith(".safetensors")}
    return bool(weights) and all(file_is_unchanged(directory / name, entry) for name, entry in weights.items())


def _refuse_foreign(bundle: Bundle, manifest: dict[str, Any] | None, *, force: bool) -> None:
    """A graph that no stage of ours lists, and that does not say it is ours (a crash), is somebody else's file."""
    stages = (manifest or {"stages": {}})["stages"]
    if bundle.graph.exists() and bundle.stage not in stages and not force and not is_ours(bundle.graph):
        raise UsageError(
            f"{bundle.graph} is there and was not written by exporter",
            expected="no such file, or one that the manifest lists",
            todo="move it away, or give --force to replace it",
        )


def _refuse_foreign_adapters(
    bundle: Bundle, manifest: dict[str, Any] | None, adapters: Sequence[RuntimeAdapter], *, force: bool
) -> None:
    """An adapter's file of this name that no export lists is somebody else's."""
    stages = (manifest or {"stages": {}})["stages"]
    listed = {name for stage, section in stages.items() if stage.startswith(STAGE) for name in section["files"]}
    for adapter in adapters:
        path = bundle.directory / adapter.file
        if path.exists() and path.name not in listed and not force:
            raise UsageError(
                f"{path} is there and was not written by exporter",
                expected="no such file, or one that the manifest lists",
                todo="move it away, name the adapter otherwise, or give --force to replace it",
            )


def _refuse_foreign_directory(directory: Path, stage: str, *, force: bool) -> None:
    """Ours: a manifest with nothing but exports, or what an export leaves when it is killed before its manifest."""
    if not directory.is_dir() or force:
        return
    others = {entry.name for entry in directory.iterdir() if not entry.name.startswith(".")}
    stages = (read_manifest(directory) or {"stages": {}})["stages"]
    adapters = {name for name in others if name.endswith(SUFFIX)}
    unfinished = WEIGHTS in others and others - adapters <= {WEIGHTS, GENAI_CONFIG, *GRAPHS.values(), *COMPANIONS}
    ours = bool(stages) and all(stage.startswith(STAGE) for stage in stages)
    if others and not ours and not unfinished:
        raise UsageError(
            f"{directory} holds something else ({', '.join(sorted(others)[:3])})",
            expected=f"a new directory or an earlier {stage}",
            todo="choose another --out, or give --force",
        )


def _companions(source: Path) -> dict[str, bytes]:
    """What makes a bundle complete alone, by name. InputRefused for a tokenizer that cannot be read."""
    files = {name: (source / name).read_bytes() for name in COMPANIONS if (source / name).is_file()}
    if TOKENIZER_JSON not in files and {"vocab.json", "merges.txt"} <= set(files):  # a GPT-2 of 2023
        files[TOKENIZER_JSON] = build_tokenizer_json(source)
    return files
