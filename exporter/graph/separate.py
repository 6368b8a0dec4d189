"""`exporter export --adapters separate`: one graph over the base's weights, and adapters that it takes at run time."""

import os
from collections.abc import Sequence
from pathlib import Path

from exporter.errors import UsageError
from exporter.files import human_bytes
from exporter.graph.adapters import RuntimeAdapter, graph_factors, read_runtime_adapter, split_name, unique_names
from exporter.graph.bundle import Bundle
from exporter.graph.export import can_be_pointed_into, export_converted, export_native
from exporter.graph.gpt2_config import read_gpt2_config
from exporter.merging.modules import model_layout
from exporter.progress import SILENT, Progress
from exporter.sources.checkpoint import open_checkpoint
from exporter.sources.hub import resolve


def export_separate(
    base: str | Path,
    adapters: Sequence[str | Path],
    out: Path,
    *,
    precision: str = "native",
    target: str = "cpu",
    force: bool = False,
    progress: Progress = SILENT,
) -> Bundle:
    """A bundle of the base in `out` with one `.onnx_adapter` file for each adapter; without one it is the base.

    An adapter is a directory or a hub id; its name is the last part of either, or given as `NAME=SOURCE`. Where `out`
    is the base's own directory, with regular safetensors files, no weight is copied; else the base is streamed first.
    Raises UsageError (names, foreign output), InputRefused (by name), EnvironmentLacking.
    """
    if not adapters:
        raise UsageError("no adapter", expected="--adapter, once or more")
    source = resolve(base, kind="base", progress=progress)
    checkpoint = open_checkpoint(source.directory)
    config = read_gpt2_config(checkpoint.config)
    layout = model_layout(checkpoint.directory, checkpoint.config)
    found = [(name, resolve(one, kind="adapter", progress=progress)) for name, one in map(split_name, adapters)]
    named = [(name or (one.id or one.directory.resolve().name).rpartition("/")[2], one) for name, one in found]
    unique_names([name for name, _ in named])
    opened: list[RuntimeAdapter] = [read_runtime_adapter(name, one, layout, config) for name, one in named]
    for one in opened:
        graph_factors(one)  # values that must be refused are, before the base is streamed
    in_place = os.path.realpath(out) == os.path.realpath(checkpoint.directory)
    if precision == "native" and in_place and can_be_pointed_into(checkpoint):
        return export_native(checkpoint.directory, target, adapters=opened, force=force)
    if in_place:
        raise UsageError(
            f"{out} is the base's own directory, and a copy of its weights would stand beside them",
            expected="another --out, or native precision over regular safetensors files",
        )
    progress.note(
        f"the base's weights, {human_bytes(checkpoint.nbytes)}, are streamed into {out} as {precision}: "
        "ONNX's external data must lie beside the graph as regular files"
    )
    return export_converted(
        checkpoint.directory, out, precision, target, adapters=opened, force=force, progress=progress
    )
