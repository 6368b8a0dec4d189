"""What an export does not write over: files and directories that no export of ours has made."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exporter.errors import UsageError
from exporter.graph.adapters import SUFFIX, TEMPLATE_SUFFIX, RuntimeAdapter, holds_adapter
from exporter.graph.builder import is_ours
from exporter.graph.bundle import GENAI_CONFIG, GRAPHS, STAGE, Bundle
from exporter.graph.companions import COMPANIONS
from exporter.graph.weights import WEIGHTS
from exporter.manifest import read_manifest


def refuse_foreign_graph(bundle: Bundle, manifest: dict[str, Any] | None, *, force: bool) -> None:
    """A graph that no stage of ours lists, and that does not say it is ours (a crash), is somebody else's file."""
    stages = (manifest or {"stages": {}})["stages"]
    if bundle.graph.exists() and bundle.stage not in stages and not force and not is_ours(bundle.graph):
        raise UsageError(
            f"{bundle.graph} is there and was not written by exporter",
            expected="no such file, or one that the manifest lists",
            todo="move it away, or give --force to replace it",
        )


def refuse_foreign_genai_config(
    bundle: Bundle, manifest: dict[str, Any] | None, content: bytes, *, force: bool
) -> None:
    """genai's file that no stage of ours lists, beside no graph of ours (a crash), unless it is what is written."""
    path, stages = bundle.directory / GENAI_CONFIG, (manifest or {"stages": {}})["stages"]
    if force or not path.exists() or any(GENAI_CONFIG in section.get("files", {}) for section in stages.values()):
        return
    if path.read_bytes() != content and not any(is_ours(bundle.directory / name) for name in GRAPHS.values()):
        raise UsageError(
            f"{path} is there and was not written by exporter",
            expected="no such file, or one that the manifest lists",
            todo="move it away, or give --force to replace it",
        )


def refuse_foreign_adapters(
    bundle: Bundle, manifest: dict[str, Any] | None, adapters: Sequence[RuntimeAdapter], *, force: bool
) -> None:
    """An adapter's file of this name that no export lists is somebody else's, unless it holds this very adapter."""
    stages = (manifest or {"stages": {}})["stages"]
    listed = {name for stage, section in stages.items() if stage.startswith(STAGE) for name in section.get("files", {})}
    for adapter in adapters:
        path = bundle.directory / adapter.file
        if path.exists() and path.name not in listed and not force and not holds_adapter(path, adapter):
            raise UsageError(
                f"{path} is there and was not written by exporter",
                expected="no such file, or one that the manifest lists",
                todo="move it away, name the adapter otherwise, or give --force to replace it",
            )


def refuse_own_directory(directory: Path, checkpoint: Path) -> None:
    """UsageError, whatever --force says: the user's model would be written over while it is read."""
    if os.path.realpath(directory) == os.path.realpath(checkpoint):
        raise UsageError(
            f"{directory} is the checkpoint's own directory",
            expected="a directory apart from what the export reads",
            todo="choose another --out",
        )


def refuse_foreign_directory(directory: Path, stage: str, *, force: bool) -> None:
    """Ours: a manifest with nothing but bundles that are complete alone, or what one leaves that was killed before."""
    if not directory.is_dir() or force:
        return
    others = {entry.name for entry in directory.iterdir() if not entry.name.startswith(".")}
    stages = (read_manifest(directory) or {"stages": {}})["stages"]
    adapters = {name for name in others if name.endswith((SUFFIX, TEMPLATE_SUFFIX))}
    unfinished = WEIGHTS in others and others - adapters <= {WEIGHTS, GENAI_CONFIG, *GRAPHS.values(), *COMPANIONS}
    ours = bool(stages) and all(stage.startswith(STAGE) and _is_alone(one) for stage, one in stages.items())
    if others and not ours and not unfinished:
        raise UsageError(
            f"{directory} holds something else ({', '.join(sorted(others)[:3])})",
            expected=f"a new directory or an earlier {stage}",
            todo="choose another --out, or give --force",
        )


def _is_alone(section: Mapping[str, Any]) -> bool:
    """False for a graph over a checkpoint's own files: the directory is somebody's model."""
    return section.get("precision") != "native" or WEIGHTS in section.get("files", {})
