"""What a bundle's manifest says of where its weights come from."""

from pathlib import Path
from typing import Any

from exporter.manifest import file_is_unchanged


def provenance(directory: Path, manifest: dict[str, Any] | None) -> str:
    """merge if the weights in `directory` are those that the merge stage of its manifest wrote, else unknown."""
    files = ((manifest or {"stages": {}})["stages"].get("merge") or {}).get("files") or {}
    weights = {name: entry for name, entry in files.items() if name.endswith(".safetensors")}
    hold = bool(weights) and all(file_is_unchanged(directory / name, entry) for name, entry in weights.items())
    return "merge" if hold else "unknown"


def merge_facts(manifest: dict[str, Any] | None) -> dict[str, Any]:
    """What `verify` of a bundle that stands alone must know of its merge: what it added to and what it rounded to.

    Empty without a merge.
    """
    request = ((manifest or {"stages": {}})["stages"].get("merge") or {}).get("request") or {}
    return {name: request[key] for name, key in (("onto", "onto"), ("merge_dtype", "dtype")) if key in request}
