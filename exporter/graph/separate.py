"""`exporter export --adapters separate`: one graph over the base's weights, and adapters that it takes at run time."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from exporter.errors import InputRefused, UsageError
from exporter.files import human_bytes, sha256_file
from exporter.graph.adapters import RuntimeAdapter
from exporter.graph.architectures import read_decoder
from exporter.graph.bundle import Bundle
from exporter.graph.decoder import Decoder
from exporter.graph.export import can_be_pointed_into, export_converted, export_native
from exporter.graph.quantize import BLOCK
from exporter.merging.changes import LowRank
from exporter.merging.delta import read_factors
from exporter.merging.lora import lora_changes
from exporter.merging.modules import ModelLayout, model_layout
from exporter.progress import SILENT, Progress
from exporter.prompts import chat_template
from exporter.sources.adapter import CONFIG, LORA, open_adapter
from exporter.sources.checkpoint import open_checkpoint
from exporter.sources.hub import Source, resolve

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}")


def export_separate(
    base: str | Path,
    adapters: Sequence[str | Path],
    out: Path,
    *,
    precision: str = "native",
    target: str = "cpu",
    block_size: int = BLOCK,
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
    decoder = read_decoder(checkpoint.config)
    named = _named([split_name(one) for one in adapters], progress)
    layout = model_layout(checkpoint.directory, checkpoint.config)
    opened = [read_runtime_adapter(name, one, layout, decoder) for name, one in named.items()]
    in_place = os.path.realpath(out) == os.path.realpath(checkpoint.directory)
    if precision == "native" and in_place and can_be_pointed_into(checkpoint):
        return export_native(checkpoint.directory, target, adapters=opened, force=force, progress=progress)
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
        checkpoint.directory,
        out,
        precision,
        target,
        block_size=block_size,
        adapters=opened,
        force=force,
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


def read_runtime_adapter(name: str, source: Source, layout: ModelLayout, decoder: Decoder) -> RuntimeAdapter:
    """An adapter whose whole effect is low-rank sums in the decoder's matrices or in the head; else InputRefused.

    Every tensor of its file is consumed or refused by name, and so are values that are not finite or do nothing.
    """
    adapter = open_adapter(source.directory)
    if adapter.method != LORA or adapter.config.get("target_parameters"):
        what = "target_parameters" if adapter.method == LORA else f"a {adapter.method} method"
        raise _not_separable(name, what, decoder)
    changes, consumed = lora_changes(adapter, 1.0, layout, {})
    if rest := sorted(set(adapter.tensors) - consumed):
        raise _not_separable(name, f"the tensor {rest[0]!r}", decoder)
    adaptable = decoder.adaptable
    low_rank: dict[str, LowRank] = {}
    for tensor, (change, *more) in sorted(changes.items()):
        module = decoder.short(tensor).removesuffix(".weight")
        if more or not isinstance(change, LowRank) or module not in adaptable:
            raise _not_separable(name, f"{type(change).__name__} of {tensor!r}", decoder)
        inputs, outputs = adaptable[module].inputs_outputs
        if (change.down.shape[1], change.up.shape[0]) != (inputs, outputs):
            raise InputRefused(
                f"{name}: {module} has factors of shape {list(change.down.shape)} and {list(change.up.shape)}",
                expected=f"{inputs} inputs and {outputs} outputs, as in the base",
                todo="this adapter was trained on another base; check base_model_name_or_path",
            )
        low_rank[module] = change
    factors = {module: _folded(change) for module, change in low_rank.items()}
    if not any(down.any() and up.any() for down, up in factors.values()):
        raise InputRefused(
            f"every factor B (or A) of the adapter {name} is zero, or there is none, so it would change nothing",
            expected="a trained adapter",
            todo="check that training ran and that the right checkpoint was saved",
        )
    facts = {
        "source": source.id or str(source.directory),
        "commit": source.commit,
        "files": {path.name: sha256_file(path) for path in (adapter.file, adapter.directory / CONFIG)},
        "rank_and_scale": {module: [change.rank, change.scale] for module, change in low_rank.items()},
    }
    return RuntimeAdapter(name, factors, facts, chat_template(source.directory))


def _folded(change: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 A^T (in, r) and scale B^T (r, out), rounded once."""
    down, up = read_factors(change)
    scaled = up.T * change.scale
    if not torch.isfinite(scaled).all():
        raise InputRefused(
            f"the scale {change.scale:g} times {change.up.name!r} overflows in float32", expected="finite factors"
        )
    return down.T.contiguous(), scaled.contiguous()


def _not_separable(name: str, what: str, decoder: Decoder) -> InputRefused:
    modules = dict.fromkeys(re.sub(r".*\.\d+\.", "", module) for module in decoder.adaptable)
    return InputRefused(
        f"the adapter {name} cannot stay apart from its base: it holds {what}",
        expected=f"LoRA on {', '.join(modules)}, and nothing else",
        todo="merge it: exporter merge",
    )
