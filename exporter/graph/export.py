"""`exporter export`: from a checkpoint, or from a base and its adapters, to bundles."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exporter.errors import InputRefused, UsageError
from exporter.graph.architectures import read_decoder
from exporter.graph.bundle import GRAPHS, Bundle, bundle_name
from exporter.graph.deployment import DEPLOYMENTS, write_deployment
from exporter.graph.native import can_be_pointed_into, export_native
from exporter.graph.parts import INT8_EXACT, Parts
from exporter.graph.weights import BLOCK, BLOCKS
from exporter.progress import SILENT, Progress
from exporter.sources.checkpoint import Checkpoint, open_checkpoint

PRECISIONS = ("native", "fp32", "fp16", "int8", "int4", INT8_EXACT)
BUILDERS = ("native", "optimum")


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which bundles, how and where: one for each precision and target. UsageError for a name that does not exist."""

    precisions: tuple[str, ...]
    targets: tuple[str, ...]
    builder: str
    block_size: int
    out: Path | None
    force: bool

    def __post_init__(self) -> None:
        _check_names("precision", self.precisions, PRECISIONS)
        _check_names("target", self.targets, tuple(GRAPHS))
        _check_names("builder", [self.builder], BUILDERS)
        if self.block_size not in BLOCKS:
            raise UsageError(f"block size {self.block_size}", expected="one of " + ", ".join(map(str, BLOCKS)))


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
    Raises UsageError (unknown name, foreign output without `force`, an `out` that would stay empty), InputRefused (a
    checkpoint that cannot be honoured), EnvironmentLacking (disk, optimum).
    """
    if deployment:
        _check_names("deployment", deployment, tuple(DEPLOYMENTS))
    if adapters is not None:
        _check_names("adapters", [adapters], ("separate",))
    wanted = Wanted(
        tuple(dict.fromkeys(precision)),
        tuple(dict.fromkeys(target)),
        builder,
        block_size,
        None if out is None else Path(out),
        force,
    )
    given = (adapter,) if isinstance(adapter, str | Path) else tuple(adapter)
    if adapters is not None or INT8_EXACT in wanted.precisions:
        bundles = _export_parts(checkpoint, base, given, wanted, separate=adapters is not None, progress=progress)
    elif checkpoint is None or base is not None or given:
        raise UsageError(
            "no checkpoint to export" if checkpoint is None else "a checkpoint beside --base or --adapter",
            expected="CHECKPOINT alone, or --base and --adapter with --adapters separate or --precision int8-exact",
        )
    else:
        bundles = _export_checkpoint(Path(checkpoint), wanted, progress)
    for bundle in bundles:
        write_deployment(bundle, deployment)
    return bundles


def _check_names(kind: str, given: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown or not given:
        raise UsageError(f"{kind} {', '.join(unknown) or '(none)'}", expected="one of " + ", ".join(known))


def _export_parts(
    checkpoint: Path | str | None,
    base: Path | str | None,
    adapters: tuple[Path | str, ...],
    wanted: Wanted,
    *,
    separate: bool,
    progress: Progress,
) -> list[Bundle]:
    if separate and INT8_EXACT in wanted.precisions:
        raise UsageError(
            "--adapters separate with --precision int8-exact",
            expected="one of the two: int8-exact adds its adapters up, beside codes that only they go with",
        )
    alone = checkpoint is None and len(wanted.precisions) == 1 and wanted.builder == "native"
    if base is None or wanted.out is None or not alone:
        raise UsageError(
            f"{'--adapters separate' if separate else '--precision int8-exact'} with other arguments than it takes",
            expected="--base, --adapter, --out, at most one --precision, the native builder and no CHECKPOINT",
        )
    if not adapters:
        raise UsageError("no adapter", expected="--adapter, once or more")
    parts = Parts(base, adapters, wanted.out, wanted.precisions[0], wanted.block_size, wanted.force)
    # What reads adapters imports transformers, which takes longer than a whole native export.
    if separate:
        from exporter.graph.separate import export_separate as write
    else:
        from exporter.graph.int8_exact import export_int8_exact as write
    return [write(parts, target, progress) for target in wanted.targets]


def _export_checkpoint(checkpoint: Path, wanted: Wanted, progress: Progress) -> list[Bundle]:
    opened = open_checkpoint(checkpoint)
    if wanted.builder == "optimum":
        if wanted.targets != ("cpu",) or wanted.precisions not in (("native",), ("fp32",)):
            raise UsageError(
                "--builder optimum with another precision or target",
                expected="float32 for the CPU, which is what it exports: no --precision and no --target",
            )
        from exporter.graph.optimum_builder import export_with_optimum  # a builder that needs an optional dependency

        return [export_with_optimum(opened, wanted.out or checkpoint.parent, force=wanted.force, progress=progress)]
    read_decoder(opened.config)  # before anything is written
    if wanted.precisions == ("native",) and can_be_pointed_into(opened):
        _refuse_unused(wanted.out, checkpoint)
    return [
        _export_one(opened, precision, target, wanted, progress)
        for precision in wanted.precisions
        for target in wanted.targets
    ]


def _refuse_unused(out: Path | None, checkpoint: Path) -> None:
    """A native graph lies in the checkpoint's directory: as `out`, that and the one above it say so too."""
    above = (os.path.realpath(checkpoint.parent), os.path.dirname(os.path.realpath(checkpoint)))  # noqa: PTH120
    if out is not None and os.path.realpath(out) not in (os.path.realpath(checkpoint), *above):
        raise UsageError(
            f"--out {out} with native precision: the graph lies beside the weights that it reads, in {checkpoint}",
            expected="no --out, or a precision that has weights of its own",
            todo="leave --out away, or give --precision fp32 or fp16 for a directory of its own",
        )


def _export_one(checkpoint: Checkpoint, precision: str, target: str, wanted: Wanted, progress: Progress) -> Bundle:
    if precision == "native" and can_be_pointed_into(checkpoint):
        return export_native(checkpoint.directory, target, force=wanted.force, progress=progress)
    if precision == "native" and wanted.out is None:
        raise InputRefused(
            f"{checkpoint.files[0].name} in {checkpoint.directory} cannot be pointed into",
            expected="model*.safetensors as regular files (a link is rejected by ONNX's external data rules)",
            todo="give --out DIR to stream the weights into a file there, or make the checkpoint with exporter merge",
        )
    from exporter.graph.standalone import export_converted  # converts values, so it imports torch

    return export_converted(
        checkpoint.directory,
        (wanted.out or checkpoint.directory.parent) / bundle_name(precision, target),
        precision,
        target,
        block_size=wanted.block_size,
        force=wanted.force,
        progress=progress,
    )
