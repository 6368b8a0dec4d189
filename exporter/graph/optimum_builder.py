"""Architectures without a builder of their own: optimum's exporter, which loads, traces and copies the whole model."""

import shutil
import tempfile
import warnings
from dataclasses import dataclass
from math import prod
from pathlib import Path

from exporter.errors import EnvironmentLacking, ExporterError, InputRefused, UsageError, lacking
from exporter.files import human_bytes, lock_directory, publish, removed_if_empty, require_free_space
from exporter.graph.bundle import GRAPHS, Bundle
from exporter.graph.companions import companions
from exporter.graph.foreign import refuse_own_directory
from exporter.graph.free_memory import free_main_memory
from exporter.graph.optimum_weights import Placed, place_weights
from exporter.graph.provenance import merge_facts, provenance
from exporter.graph.publish import remove_dropped
from exporter.graph.weights import WEIGHTS
from exporter.manifest import describe_file, read_manifest, versions, write_stage
from exporter.progress import SILENT, Progress
from exporter.sources.checkpoint import Checkpoint
from exporter.sources.tensors import FLOATS

TASK = "text-generation-with-past"
# fp32 weights, twice while they are saved again
DISK_FACTOR = 4
# Peak memory and time: a line through two exports on 2 cores with optimum 2.1 (GPT-2 shapes of 111M and 590M
# parameters: 2.7 GB in 23 s, 9.5 GB in 67 s). What it takes at any size, and for each byte of the float32 weights.
MEMORY, MEMORY_A_BYTE = 1.1e9, 3.6
SECONDS, SECONDS_A_BYTE = 13.0, 23e-9


def export_with_optimum(
    checkpoint: Checkpoint, out: Path, *, force: bool = False, progress: Progress = SILENT
) -> Bundle:
    """A float32 bundle in `out`/optimum/. EnvironmentLacking without optimum, InputRefused where optimum refuses.

    UsageError for a directory of somebody else's without `force`, and for the checkpoint's own.
    """
    _require_optimum()
    directory = out / "optimum"
    bundle = Bundle(directory, "optimum", "cpu", directory / GRAPHS["cpu"])
    refuse_own_directory(directory, checkpoint.directory)
    others = [one for one in directory.iterdir() if not one.name.startswith(".")] if directory.is_dir() else []
    if others and not _is_exported(bundle) and not force:
        raise UsageError(
            f"{directory} holds something else",
            expected="a new directory or an earlier export with optimum",
            todo="choose another --out, or give --force",
        )
    cost = estimate_cost(checkpoint)
    _require_memory(cost)
    progress.note(f"optimum loads, traces and saves the whole model: {cost}")
    with removed_if_empty(directory), lock_directory(directory):
        _remove_leftovers(directory)
        require_free_space(directory, DISK_FACTOR * checkpoint.nbytes, "exporting with optimum")
        _export(checkpoint, bundle, cost, progress)
    return bundle


def _is_exported(bundle: Bundle) -> bool:
    return bundle.stage in (read_manifest(bundle.directory) or {"stages": {}})["stages"]


def _export(checkpoint: Checkpoint, bundle: Bundle, cost: "Cost", progress: Progress) -> None:
    directory = bundle.directory
    with (
        tempfile.TemporaryDirectory(prefix=".optimum.", suffix=".partial", dir=directory) as scratch,
        progress.task(f"optimum exports {checkpoint.directory.name}", 1) as task,
    ):
        _trace(checkpoint.directory, Path(scratch))
        placed = place_weights(Path(scratch) / GRAPHS["cpu"], checkpoint, progress)
        _announce(placed, progress)
        for name, data in companions(checkpoint.directory).items():
            (Path(scratch) / name).write_bytes(data)
        files = sorted(file for file in Path(scratch).iterdir() if file.is_file() and not _is_traced(file))
        earlier = bundle.section.get("files", {}) if _is_exported(bundle) else {}
        for stale in filter(_is_traced, directory.iterdir()):  # of an export that left the weights there
            stale.unlink()
        for file in files:
            publish(file, directory / file.name)
        manifest = read_manifest(checkpoint.directory)
        section = {
            "precision": bundle.precision,
            "target": bundle.target,
            "graph": bundle.graph.name,
            "weights": [WEIGHTS] if placed.digests else [],
            "files": {file.name: describe_file(directory / file.name) for file in files},
            "builder": "optimum",
            "task": TASK,
            "tensors": dict(placed.digests),
            "shared": dict(placed.shared),
            "missing": list(placed.missing),
            "estimated": {"weights": cost.weights, "memory": cost.memory, "seconds": cost.seconds},
            "provenance": provenance(checkpoint.directory, manifest),
            "source": {file.name: describe_file(file)["sha256"] for file in checkpoint.files},
            "versions": versions(),
        } | merge_facts(manifest)
        write_stage(directory, bundle.stage, section)
        remove_dropped(directory, earlier)
        task.advance()


@dataclass(frozen=True, slots=True)
class Cost:
    """Estimates from the headers. weights: bytes in float32. memory: bytes at the peak. seconds: on two cores."""

    weights: int
    memory: int
    seconds: int

    def __str__(self) -> str:
        weights = f"its float32 weights are {human_bytes(self.weights)}"
        return f"about {human_bytes(self.memory)} of memory ({weights}) and {self.seconds} s on two cores"


def estimate_cost(checkpoint: Checkpoint) -> Cost:
    """From the sizes in the headers; nothing is loaded."""
    elements = sum(prod(info.shape) for info in checkpoint.tensors.values() if info.dtype in FLOATS)
    weights = 4 * max(1, elements)
    memory, seconds = MEMORY + MEMORY_A_BYTE * weights, SECONDS + SECONDS_A_BYTE * weights
    return Cost(weights, int(memory), round(seconds))


def _require_memory(cost: Cost) -> None:
    free = free_main_memory()
    if cost.memory > free:
        raise EnvironmentLacking(
            f"exporting with optimum takes {cost}, and {human_bytes(free)} are free",
            expected="a machine that holds the model several times",
            todo="free memory, use a larger machine, or export an architecture that the native builder knows",
        )


def _require_optimum() -> None:
    try:
        import optimum.exporters.onnx  # noqa: F401 (heavy, and absent without the extra)
    except ImportError as error:
        raise EnvironmentLacking(
            f"optimum's ONNX exporter cannot be imported ({error})",
            expected="the extra [optimum] and a transformers version that it supports",
            todo='run: pip install -c constraints.txt -e ".[optimum]"',
        ) from error


def _remove_leftovers(directory: Path) -> None:
    """What an export that was killed had left half-made: several times the model's size."""
    for left in directory.glob(".optimum.*.partial"):
        shutil.rmtree(left, ignore_errors=True)


def _trace(checkpoint: Path, output: Path) -> None:
    from optimum.exporters.onnx import main_export

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracer warnings about transformers' code, hundreds of them
            main_export(str(checkpoint), output=output, task=TASK, dtype="fp32", device="cpu", do_validation=False)
    except ExporterError:
        raise
    except Exception as error:  # whatever else optimum, transformers or torch raise means that it cannot be traced
        if short := lacking(error):
            raise short from error
        first_line = (str(error).strip().splitlines() or [""])[0][:300]
        raise InputRefused(
            f"optimum cannot export {checkpoint}: {type(error).__name__}: {first_line}",
            expected=f"an architecture that optimum exports for {TASK}",
        ) from error


def _is_traced(file: Path) -> bool:
    """The weights as optimum writes them beside a large graph, under names of its own."""
    return file.name.startswith(f"{GRAPHS['cpu']}_data")


def _announce(placed: Placed, progress: Progress) -> None:
    if placed.missing:
        names = ", ".join(placed.missing[:4])
        progress.note(
            f"{len(placed.missing)} tensors of the checkpoint do not stand in optimum's graph as they are, such as "
            f"{names}: verify refuses or fails the bundle if they are parameters of the model"
        )
