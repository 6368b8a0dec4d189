"""A bundle: a directory that a runtime can open, and what its manifest says about it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import InputRefused
from exporter.graph.weights import WEIGHTS, Weight, open_weights
from exporter.manifest import describe_file, read_manifest, stamp
from exporter.sources.checkpoint import open_checkpoint
from exporter.sources.own_files import require_own_files

GRAPHS = {"cpu": "model.onnx", "cuda": "model_cuda.onnx"}
GENAI_CONFIG = "genai_config.json"
STAGE = "export-"
KEYS = {"precision", "target", "graph"}  # a run's own manifest has sections of the same names without any of them


@dataclass(frozen=True, slots=True)
class Bundle:
    """`precision`: native, fp32, fp16, int8, int4 or optimum. `target`: cpu or cuda. `graph`: the .onnx file."""

    directory: Path
    precision: str
    target: str
    graph: Path

    @property
    def stage(self) -> str:
        """The manifest section that describes it."""
        return f"{STAGE}{self.precision}-{self.target}"

    @property
    def section(self) -> dict[str, Any]:
        """The manifest's section; InputRefused if it is gone."""
        manifest = read_manifest(self.directory)
        if manifest is None or self.stage not in manifest["stages"]:
            raise InputRefused(f"{self.directory} has no {self.stage} in its manifest", todo="export it again")
        return manifest["stages"][self.stage]


def bundle_name(precision: str, target: str) -> str:
    """The directory of a bundle with weights of its own."""
    return precision if target == "cpu" else f"{precision}-{target}"


def bundles_in(directory: Path) -> list[Bundle]:
    """The bundles that a directory's manifest lists, cpu first. InputRefused for a malformed manifest."""
    if directory.is_dir():
        require_own_files(directory)
    manifest = read_manifest(directory) if directory.is_dir() else None
    found = []
    for stage, section in sorted((manifest or {"stages": {}})["stages"].items()):
        if stage.startswith(STAGE) and (not isinstance(section, dict) or KEYS & section.keys()):
            try:
                bundle = Bundle(directory, section["precision"], section["target"], directory / section["graph"])
            except (KeyError, TypeError) as error:
                raise InputRefused(f"the manifest in {directory} is malformed at {stage}") from error
            names = (bundle.precision, bundle.target, section["graph"])
            if not all(isinstance(name, str) and "\0" not in name for name in names):
                raise InputRefused(f"the manifest in {directory} is malformed at {stage}", todo="export it again")
            if bundle.graph.parent != directory or bundle.target not in GRAPHS:
                raise InputRefused(f"the manifest in {directory} names {section['graph']!r}", expected="a graph in it")
            found.append(bundle)
    return sorted(found, key=lambda bundle: (bundle.target != "cpu", bundle.precision))


def bundle_weights(bundle: Bundle) -> Mapping[str, Weight]:
    """The stored weights by checkpoint name; headers only."""
    own, listed = bundle.directory / WEIGHTS, bundle.section.get("weights")
    if isinstance(listed, list) and WEIGHTS in listed and own.is_file():
        return open_weights(own)
    return open_checkpoint(bundle.directory).tensors


def describe_known(path: Path, manifest: Mapping[str, Any] | None) -> dict[str, Any]:
    """A manifest entry for `path`; its hash comes from another stage's entry while the file's stamp is the same."""
    return describe_file(path, known_sha256(path, manifest))


def describe_unread(path: Path, manifest: Mapping[str, Any] | None) -> dict[str, Any]:
    """As `describe_known`, without reading the file: its hash is None where no stage recorded it."""
    return {**stamp(path), "sha256": known_sha256(path, manifest)}


def known_sha256(path: Path, manifest: Mapping[str, Any] | None) -> str | None:
    """What a stage recorded for `path`, while the file's stamp is the same; None where no stage did."""
    now = stamp(path)
    for section in (manifest or {"stages": {}})["stages"].values():
        entry = (section.get("files") or {}).get(path.name) if isinstance(section, dict) else None
        if isinstance(entry, dict) and "sha256" in entry and all(entry.get(key) == now[key] for key in now):
            return entry["sha256"]
    return None
