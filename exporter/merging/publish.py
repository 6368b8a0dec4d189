"""From finished partial files to a checkpoint under its final names, so that no loader takes what is between."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.files import partial_path, sync_directory, write_partial
from exporter.manifest import MANIFEST, describe_file, manifest_bytes
from exporter.merging.account import describe_shard
from exporter.merging.journal import FinishedShard, Journal
from exporter.merging.request import STAGE, readable_manifest
from exporter.sources.snapshot import TOKENIZER

# Files that a loader takes for weights: none of an earlier checkpoint may stand beside the new ones.
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json", "pytorch_model.bin.index.json")


def publish_checkpoint(
    out: Path,
    shards: Mapping[str, FinishedShard],
    small: Mapping[str, bytes],
    section: dict[str, Any],
    journal: Journal,
) -> None:
    """Old names go, the configuration first; new ones come, the configuration last: no loader takes what is between.

    Everything stands on the disk under partial names before that, the manifest too: the rest is renaming. `section`
    gets its "files".
    """
    for name, data in small.items():
        write_partial(out / name, data)
    section["files"] = {name: describe_shard(place_of(out / name), shard) for name, shard in shards.items()}
    section["files"] |= {name: describe_file(partial_path(out / name)) for name in small}
    write_partial(out / MANIFEST, manifest_bytes({STAGE: section}))
    _remove_outputs(out, journal)
    for name in [*shards, *sorted(small, key=lambda name: name == "config.json"), MANIFEST]:
        if name == MANIFEST or name == "config.json":
            sync_directory(out)
        place_of(out / name).replace(out / name)
    sync_directory(out)
    journal.forget()


def place_of(final: Path) -> Path:
    """Where a file stands before it is renamed; a shard may have its name from a run that was killed."""
    return partial_path(final) if partial_path(final).exists() else final


def _remove_outputs(out: Path, journal: Journal) -> None:
    """Take away what an earlier run listed as its output, and every other file that a loader would take.

    The configuration goes first, so that nothing loads any more, and the manifest last: after a kill it still lists.
    """
    stages = (readable_manifest(out) or {"stages": {}})["stages"].values()
    old = {name for section in stages for name in section.get("files", {})} | TOKENIZER
    files = [path for path in out.iterdir() if path.is_file() or path.is_symlink()]
    files = [path for path in files if path.name in old or any(map(path.match, WEIGHTS))]
    (out / "config.json").unlink(missing_ok=True)
    sync_directory(out)
    for path in files:
        if not journal.keeps(path):
            path.unlink(missing_ok=True)
    (out / MANIFEST).unlink(missing_ok=True)


def remove_partials(out: Path, journal: Journal | None) -> None:
    """What an interrupted run left, but for the shards it had finished."""
    for path in out.glob(".*.partial"):
        if path.is_file() and not (journal and journal.keeps(path)):
            path.unlink(missing_ok=True)
