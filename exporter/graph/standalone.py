"""A bundle that is complete alone: weights of its own, graph, configuration and tokenizer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from exporter.files import disk_errors, lock_directory, removed_if_empty, write_atomically
from exporter.graph.adapters import RuntimeAdapter, adapter_facts, write_adapters
from exporter.graph.architectures import read_decoder
from exporter.graph.bundle import GRAPHS, Bundle, describe_known
from exporter.graph.companions import companions
from exporter.graph.components import ACCURACY_LEVEL
from exporter.graph.decoder import MATRICES, Decoder, decoder_weights
from exporter.graph.foreign import refuse_foreign_directory, refuse_own_directory
from exporter.graph.provenance import merge_facts, provenance
from exporter.graph.publish import bundle_section, publish_section, retire_written_over, write_graph
from exporter.graph.quantized_file import Stored, bits_per_weight, write_weights
from exporter.graph.weights import WEIGHTS, open_weights
from exporter.manifest import describe_file, read_manifest
from exporter.progress import Progress
from exporter.sources.checkpoint import Checkpoint, open_checkpoint
from exporter.sources.tensors import TensorInfo


def export_converted(
    checkpoint_dir: Path,
    directory: Path,
    precision: str,
    target: str,
    *,
    block_size: int,
    adapters: Sequence[RuntimeAdapter] = (),
    force: bool,
    progress: Progress,
) -> Bundle:
    """A checkpoint's weights streamed into `directory`/weights.safetensors in `precision`, its small files copied.

    Raises InputRefused (configuration, tensors, tokenizer), and as `write_bundle`.
    """
    checkpoint = open_checkpoint(checkpoint_dir)
    bundle = Bundle(directory, precision, target, directory / GRAPHS[target])
    stored = _storage(read_decoder(checkpoint.config), checkpoint, precision, block_size)
    manifest = read_manifest(checkpoint.directory)
    facts = {"provenance": provenance(checkpoint.directory, manifest)} | merge_facts(manifest)
    small = companions(checkpoint.directory)
    return write_bundle(bundle, checkpoint, stored, small, facts, adapters=adapters, force=force, progress=progress)


def write_bundle(
    bundle: Bundle,
    checkpoint: Checkpoint,
    stored: Mapping[str, Stored],
    small: Mapping[str, bytes],
    facts: Mapping[str, Any],
    *,
    extra: Mapping[str, torch.Tensor] | None = None,
    adapters: Sequence[RuntimeAdapter] = (),
    force: bool,
    progress: Progress,
) -> Bundle:
    """Write `bundle` whole: weights, graph, small files, manifest.

    stored: by checkpoint name. small: files beside the weights. facts: of the manifest's section. extra: tensors that
    go into the weights as they are. Raises as `write_weights`, and UsageError for a directory of somebody else's or for
    the checkpoint's own.
    """
    directory = bundle.directory
    manifest = read_manifest(checkpoint.directory)
    refuse_own_directory(directory, checkpoint.directory)
    refuse_foreign_directory(directory, bundle.stage, force=force)
    with removed_if_empty(directory), lock_directory(directory), disk_errors(directory):
        sources = {file.name: describe_known(file, manifest)["sha256"] for file in checkpoint.files}
        digests = write_weights(directory / WEIGHTS, stored, progress, extra=extra)
        weights = {WEIGHTS: describe_file(directory / WEIGHTS)}
        written = weights | write_adapters(directory, adapters)
        gone = retire_written_over(bundle, written)
        for name, data in small.items():
            write_atomically(directory / name, data)
        decoder = read_decoder(checkpoint.config)
        own = decoder_weights(decoder, open_weights(directory / WEIGHTS))
        write_graph(bundle, decoder, own, checkpoint.config, adapters)
        facts = {**facts, "source": sources, "tensors": digests} | adapter_facts(adapters)
        if blocks := {one.block for one in stored.values() if one.bits}:
            matrices = [stored[one.name] for short, one in own.items() if decoder.parameters[short].kind in MATRICES]
            bits = {"matrices": bits_per_weight(matrices), "all": bits_per_weight(stored.values())}
            facts |= {"block": min(blocks), "bits_per_weight": bits, "accuracy_level": ACCURACY_LEVEL[bundle.target]}
        section = bundle_section(bundle, weights, facts)
        section["files"] |= written | {name: describe_file(directory / name) for name in small}
        publish_section(bundle, section, gone)
    return bundle


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
