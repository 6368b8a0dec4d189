"""What every bundle has beside its weights: the graph, genai's configuration, and its section of the manifest."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exporter.files import write_atomically
from exporter.graph.adapters import SUFFIX, TEMPLATE_SUFFIX, RuntimeAdapter, adapted_modules
from exporter.graph.architectures import build_model
from exporter.graph.builder import OPSET, exporter_version, serialize
from exporter.graph.bundle import GENAI_CONFIG, GRAPHS, Bundle, bundles_in
from exporter.graph.companions import COMPANIONS
from exporter.graph.components import ACCURACY_LEVEL
from exporter.graph.decoder import Decoder
from exporter.graph.genai_config import genai_config
from exporter.graph.weights import Weight
from exporter.manifest import describe_file, file_is_unchanged, read_manifest, remove_stage, versions, write_stage


def write_graph(
    bundle: Bundle,
    decoder: Decoder,
    weights: Mapping[str, Weight],
    config: Mapping[str, Any],
    adapters: Sequence[RuntimeAdapter],
) -> None:
    """The graph over `weights` (by checkpoint name), and genai's file. config: config.json. Raises as `build_model`."""
    metadata = {
        "exporter.version": exporter_version(),
        "exporter.precision": bundle.precision,
        "exporter.target": bundle.target,
    }
    level = ACCURACY_LEVEL[bundle.target]
    adapted = adapted_modules(adapters)
    model = build_model(decoder, weights, bundle.target, metadata, accuracy_level=level, adapted=adapted)
    write_atomically(bundle.graph, serialize(model))
    if owns_genai_config(bundle):
        content = genai_config(bundle.directory, config, decoder.sizes, bundle.graph.name, bundle.target)
        write_atomically(bundle.directory / GENAI_CONFIG, content)


def owns_genai_config(bundle: Bundle) -> bool:
    """genai reads one configuration a directory: with graphs for both targets it names the one that runs anywhere."""
    return bundle.target == "cpu" or not (bundle.directory / GRAPHS["cpu"]).exists()


def bundle_section(bundle: Bundle, weights: dict[str, dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    """The manifest's section, all but the files of adapters and companions. weights: entries by file name."""
    own = [bundle.graph.name, *([GENAI_CONFIG] if owns_genai_config(bundle) else [])]
    files = {name: describe_file(bundle.directory / name) for name in own}
    return {
        "precision": bundle.precision,
        "target": bundle.target,
        "graph": bundle.graph.name,
        "weights": sorted(weights),
        "files": files | weights,
        "builder": "native",
        "opset": OPSET,
        "versions": versions(),
    } | facts


def retire_written_over(bundle: Bundle, written: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Take bundles of other sections away whose graph, weights or adapters this one writes over.

    written: entries of this one's weights and adapters, by file name. Before its graph is written: genai's file names
    the graph that is left. Returns what the bundles had listed, for `publish_section`.
    """
    gone: dict[str, dict[str, Any]] = {}
    for other in bundles_in(bundle.directory):
        if other.stage == bundle.stage:
            continue
        listed = other.section["files"]
        if other.graph == bundle.graph or _is_written_over(listed, written):
            gone |= listed
            remove_stage(bundle.directory, other.stage)
            if other.graph != bundle.graph and file_is_unchanged(other.graph, listed.get(other.graph.name, {})):
                other.graph.unlink()
    return gone


def _is_written_over(listed: Mapping[str, dict[str, Any]], now: Mapping[str, dict[str, Any]]) -> bool:
    pairs = ((listed[name].get("sha256"), now[name]["sha256"]) for name in listed.keys() & now.keys())
    return any(one != other for one, other in pairs if one and other)  # unread weights have no hash


def publish_section(bundle: Bundle, section: dict[str, Any], gone: Mapping[str, dict[str, Any]]) -> None:
    """Write the manifest's section, and what other sections say of the files that they share with it.

    gone: what `retire_written_over` returned; its small files go, unless a section lists them still.
    """
    earlier = (read_manifest(bundle.directory) or {"stages": {}})["stages"].get(bundle.stage, {}).get("files", {})
    for other in bundles_in(bundle.directory):
        if other.stage != bundle.stage:
            listed = other.section
            files = {name: section["files"].get(name, entry) for name, entry in listed["files"].items()}
            if GENAI_CONFIG in section["files"]:
                files.pop(GENAI_CONFIG, None)
            write_stage(bundle.directory, other.stage, listed | {"files": files})
    write_stage(bundle.directory, bundle.stage, section)
    small = {name: entry for name, entry in {**gone, **earlier}.items() if _is_small(name)}
    remove_dropped(bundle.directory, small)


def _is_small(name: str) -> bool:
    """Weights that a section lists may be the user's own."""
    return name in COMPANIONS or name.endswith((SUFFIX, TEMPLATE_SUFFIX))


def remove_dropped(directory: Path, earlier: Mapping[str, dict[str, Any]]) -> None:
    """Take away what the export before wrote, unchanged since, and no section lists any more. earlier: its entries."""
    stages = (read_manifest(directory) or {"stages": {}})["stages"]
    listed = {name for section in stages.values() for name in section.get("files", {})}
    for name, entry in earlier.items():
        path = directory / name
        if name not in listed and path.parent == directory and file_is_unchanged(path, entry):
            path.unlink()
