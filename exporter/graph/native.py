"""A graph in a checkpoint's own directory: it points into the safetensors that lie there."""

from collections.abc import Sequence
from pathlib import Path

from exporter.files import disk_errors, human_bytes, lock_directory
from exporter.graph.adapters import RuntimeAdapter, adapter_facts, write_adapters
from exporter.graph.architectures import read_decoder
from exporter.graph.bundle import GRAPHS, Bundle, describe_known, describe_unread, known_sha256
from exporter.graph.foreign import refuse_foreign_adapters, refuse_foreign_genai_config, refuse_foreign_graph
from exporter.graph.genai_config import genai_config
from exporter.graph.provenance import provenance
from exporter.graph.publish import (
    bundle_section,
    owns_genai_config,
    publish_section,
    retire_written_over,
    write_graph,
)
from exporter.manifest import read_manifest
from exporter.progress import Progress
from exporter.sources.checkpoint import Checkpoint, open_checkpoint
from exporter.sources.unchanged import require_unchanged, watch

# Bytes of unhashed weights that a native export still reads: about a second.
READ_AT_ONCE = 2 << 30


def export_native(
    checkpoint_dir: Path,
    target: str,
    *,
    adapters: Sequence[RuntimeAdapter] = (),
    force: bool,
    progress: Progress,
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
        refuse_foreign_graph(bundle, manifest, force=force)
        if owns_genai_config(bundle):
            content = genai_config(directory, checkpoint.config, decoder.sizes, bundle.graph.name, target)
            refuse_foreign_genai_config(bundle, manifest, content, force=force)
        refuse_foreign_adapters(bundle, manifest, adapters, force=force)
        facts = {"provenance": provenance(directory, manifest)} | adapter_facts(adapters)
        unseen = [file for file in checkpoint.files if known_sha256(file, manifest) is None]
        if (size := sum(file.stat().st_size for file in unseen)) > READ_AT_ONCE:
            progress.note(
                f"{human_bytes(size)} of weights are not read: the manifest records their sizes, times and headers, "
                "but no hashes. `exporter verify` reads them; after copying the directory, export again"
            )
            weights = {file.name: describe_unread(file, manifest) for file in checkpoint.files}
        else:
            if unseen:
                from exporter.graph.finite import require_finite  # imports torch, which takes longer than all the rest

                require_finite(info for info in checkpoint.tensors.values() if info.file in unseen)
            weights = {file.name: describe_known(file, manifest) for file in checkpoint.files}
        require_unchanged(watched)
        written = weights | write_adapters(directory, adapters)
        gone = retire_written_over(bundle, written)
        write_graph(bundle, decoder, checkpoint.tensors, checkpoint.config, adapters)
        section = bundle_section(bundle, weights, facts)
        section["files"] |= written
        publish_section(bundle, section, gone)
    return bundle


def can_be_pointed_into(checkpoint: Checkpoint) -> bool:
    """True for safetensors files that are no links: what ONNX's external data may lie in."""
    return all(file.suffix == ".safetensors" and not file.is_symlink() for file in checkpoint.files)
