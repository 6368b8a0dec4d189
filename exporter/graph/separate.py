"""`exporter export --adapters separate`: one graph over the base's weights, and adapters that it takes at run time."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from exporter.errors import UsageError
from exporter.files import human_bytes
from exporter.graph.adapter_source import read_runtime_adapter
from exporter.graph.architectures import read_decoder
from exporter.graph.bundle import Bundle
from exporter.graph.native import can_be_pointed_into, export_native
from exporter.graph.parts import Parts
from exporter.graph.standalone import export_converted
from exporter.merging.modules import model_layout
from exporter.progress import Progress
from exporter.sources.checkpoint import open_checkpoint
from exporter.sources.hub import Source, resolve

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}")


def export_separate(parts: Parts, target: str, progress: Progress) -> Bundle:
    """A bundle of the base in `parts.out` with one `.onnx_adapter` file for each adapter; without one it is the base.

    An adapter is a directory or a hub id; its name is the last part of either, or given as `NAME=SOURCE`. Where the
    output is the base's own directory, with regular safetensors files, no weight is copied; else the base is streamed.
    Raises UsageError (names, foreign output), InputRefused (by name), EnvironmentLacking.
    """
    source = resolve(parts.base, kind="base", progress=progress)
    checkpoint = open_checkpoint(source.directory)
    decoder = read_decoder(checkpoint.config)
    named = _named([split_name(one) for one in parts.adapters], progress)
    layout = model_layout(checkpoint.directory, checkpoint.config)
    opened = [read_runtime_adapter(name, one, checkpoint, layout, decoder) for name, one in named.items()]
    in_place = os.path.realpath(parts.out) == os.path.realpath(checkpoint.directory)
    if parts.precision == "native" and in_place and can_be_pointed_into(checkpoint):
        return export_native(checkpoint.directory, target, adapters=opened, force=parts.force, progress=progress)
    if in_place:
        raise UsageError(
            f"{parts.out} is the base's own directory, and a copy of its weights would stand beside them",
            expected="another --out, or native precision over regular safetensors files",
        )
    progress.note(
        f"the base's weights, {human_bytes(checkpoint.nbytes)}, are streamed into {parts.out} as {parts.precision}: "
        "ONNX's external data must lie beside the graph as regular files"
    )
    return export_converted(
        checkpoint.directory,
        parts.out,
        parts.precision,
        target,
        block_size=parts.block_size,
        adapters=opened,
        force=parts.force,
        progress=progress,
    )


def split_name(given: str | Path) -> tuple[str | None, str | Path]:
    """`NAME=SOURCE` as its parts; a source without a name as (None, source)."""
    name, found, source = str(given).partition("=")
    if found and NAME.fullmatch(name) and source and not Path(given).exists():
        return name, source
    return None, given


def _named(given: Sequence[tuple[str | None, str | Path]], progress: Progress) -> dict[str, Source]:
    """Adapters by names that tell them apart and can be names of files; else UsageError."""
    found: dict[str, Source] = {}
    for own, one in given:
        source = resolve(one, kind="adapter", progress=progress)
        name = own or (source.id or source.directory.resolve().name).rpartition("/")[2]
        todo = "name it: --adapter NAME=DIRECTORY"
        if not NAME.fullmatch(name):
            raise UsageError(f"the adapter name {name!r}", expected="letters, digits, '.', '_', '-'", todo=todo)
        if name in found:
            raise UsageError(f"two adapters named {name}", expected="one name for each", todo=todo)
        found[name] = source
    return found
