"""From a directory to a Runner: the right bundle, unchanged since its export, and room for it."""

import os
import shlex
from pathlib import Path
from typing import Any

from exporter.errors import EnvironmentLacking, InputRefused, UsageError
from exporter.files import human_bytes
from exporter.graph.architectures import read_decoder
from exporter.graph.bundle import GRAPHS, Bundle, bundle_weights, bundles_in
from exporter.graph.decoder import decoder_weights
from exporter.graph.genai_config import stop_tokens
from exporter.graph.graph_check import load_graph, require_our_operators
from exporter.manifest import MANIFEST, file_is_unchanged, read_manifest
from exporter.runtime.copying_runner import CopyingRunner, require_known_interface
from exporter.runtime.memory import free_memory, needed_memory
from exporter.runtime.runner import Runner
from exporter.runtime.session import cuda_is_usable, open_session, provider_name, require_provider
from exporter.sources.checkpoint import read_json
from exporter.sources.context import CONTEXT_KEYS, context_length

MERGED = "merged"
# Nearest to the merged checkpoint first.
BEST = ("native", "fp32", "fp16", "int8", "int8-exact", "int4")


def load(
    bundle: Path | str | Bundle,
    *,
    adapter: str | None = None,
    target: str | None = None,
    provider: str | None = None,
    threads: int | None = None,
) -> Runner:
    """Open a bundle's directory, or the best bundle that fits in a directory of bundles (`artifacts/<name>`).

    `provider` (cpu, cuda, or onnxruntime's name of either) defaults to the target's own; without `target`, cuda where
    a device is usable. `adapter`: one that was exported with --adapters separate; none by default.
    A bundle of other weights than `merged` beside it holds is opened only under its own directory's name.
    Raises UsageError, InputRefused (no bundle, files changed since the export), EnvironmentLacking (provider, memory).
    """
    if target is not None and target not in GRAPHS:
        raise UsageError(f"target {target!r}", expected="one of " + ", ".join(GRAPHS))
    if provider is not None:
        provider = provider_name(provider)
        require_provider(provider)
    chosen = bundle if isinstance(bundle, Bundle) else choose_bundle(Path(bundle), target, provider)
    provider = provider or chosen.target
    require_provider(provider)
    require_memory(chosen, provider)
    check_unchanged(chosen)
    config = read_json(chosen.directory / "config.json")
    n_positions, vocab_size = _sizes(chosen, config)
    graph = load_graph(chosen.graph)
    if chosen.precision != "optimum":
        require_our_operators(chosen.graph, graph)
    session = open_session(chosen.graph, provider, threads)
    if chosen.precision == "optimum":
        require_known_interface(session)
    kind = CopyingRunner if chosen.precision == "optimum" else Runner
    runner = kind(
        session,
        chosen,
        provider=provider,
        n_positions=n_positions,
        vocab_size=vocab_size,
        stop_tokens=stop_tokens(chosen.directory, config),
    )
    return runner.with_adapter(adapter) if adapter is not None else runner


def _sizes(bundle: Bundle, config: dict[str, Any]) -> tuple[int, int]:
    """Positions and vocabulary."""
    if bundle.precision != "optimum":
        decoder = read_decoder(config)
        decoder_weights(decoder, bundle_weights(bundle))  # config.json still belongs to these weights
        return decoder.sizes.n_positions, decoder.sizes.vocab_size
    positions = context_length(config)
    vocabulary = config.get("vocab_size")
    if positions is None or not isinstance(vocabulary, int):
        raise InputRefused(
            f"config.json in {bundle.directory} does not say how many positions and tokens there are",
            expected=f"{' or '.join(CONTEXT_KEYS)}, and vocab_size",
        )
    return positions, vocabulary


def choose_bundle(directory: Path, target: str | None, provider: str | None) -> Bundle:
    """The one bundle asked for, or of several in subdirectories the best that fits into memory."""
    if not directory.is_dir():
        raise InputRefused(
            f"{directory} is not a directory",
            expected="one with a bundle in it",
            todo="check the path, or run exporter export first",
        )
    found = bundles_in(directory)
    needed, refused = ({}, []) if found else _usable_beneath(directory)
    targets = [target] if target else [provider] if provider else ["cuda", "cpu"] if cuda_is_usable() else ["cpu"]
    graphs = found or list(needed)
    fitting = sorted((one for one in graphs if one.target in targets), key=_preference)
    if not fitting:
        if refused:
            raise refused[0]
        other = " for " + " or ".join(sorted({one.target for one in graphs})) if graphs else ""
        raise InputRefused(
            f"{directory} holds {'graphs' + other if other else 'no exported graph'}",
            expected=f"a graph for {' or '.join(targets)}",
            todo=f"run: exporter export {shlex.quote(str(directory))} --target {targets[-1]}",
        )
    if not found:
        require_provider(provider or targets[0])
        current = [one for one in fitting if not _is_outdated(one)]
        enough = [one for one in fitting if needed[one] <= free_memory(provider or one.target)]
        if enough and not any(one in current for one in enough):
            raise InputRefused(
                f"{enough[0].directory} was made of other weights than {directory / MERGED} holds",
                expected="a bundle of those weights that fits into memory",
                todo=f"export {directory / MERGED} again, or name {enough[0].directory} to open it as it is",
            )
        fitting = [one for one in current if one in enough] or (current or fitting)[-1:]
    return fitting[0]


def _is_outdated(bundle: Bundle) -> bool:
    """True for a bundle of a merge, if the merged checkpoint beside it has other weights by now."""
    section = bundle.section
    source = section.get("source")
    if section.get("provenance") != "merge" or not isinstance(source, dict):
        return False
    try:
        manifest = read_manifest(bundle.directory.parent / MERGED)
    except InputRefused:
        manifest = None
    if manifest is None:
        return False
    merged = manifest["stages"].get("merge", {}).get("files", {})
    return any(name not in merged or merged[name].get("sha256") not in (None, sha) for name, sha in source.items())


def _preference(bundle: Bundle) -> tuple[bool, int]:
    return bundle.target != "cuda", BEST.index(bundle.precision) if bundle.precision in BEST else len(BEST)


def _usable_beneath(directory: Path) -> tuple[dict[Bundle, int], list[InputRefused]]:
    """The bundles in subdirectories, with the memory that each needs, and why others cannot be used."""
    needed: dict[Bundle, int] = {}
    refused: list[InputRefused] = []
    for child in sorted(directory.iterdir()) if directory.is_dir() else []:
        if child.name.startswith(".") or not os.access(child / MANIFEST, os.F_OK):
            continue
        try:
            needed |= {one: needed_memory(one) for one in bundles_in(child)}
        except InputRefused as error:
            refused.append(error)
    return needed, refused


def require_memory(bundle: Bundle, provider: str) -> None:
    """EnvironmentLacking, naming a bundle beside this one that fits, when the weights would not fit into memory."""
    needed, free = needed_memory(bundle), free_memory(provider)
    if needed <= free:
        return
    beside, _ = _usable_beneath(bundle.directory.parent)
    others = [one for one in beside if one.target == bundle.target and beside[one] <= free and not _is_outdated(one)]
    smaller = sorted(others, key=_preference)
    remedy = f"use {smaller[0].directory}, which fits" if smaller else "free memory, or export --precision int8 or int4"
    raise EnvironmentLacking(
        f"{bundle.graph} needs about {human_bytes(needed)} of memory on {provider}, and {human_bytes(free)} are free",
        expected="a model that fits",
        todo=remedy,
    )


def check_unchanged(bundle: Bundle) -> None:
    """InputRefused unless graph and weights are those of the export: by stamp, re-hashed where the stamp differs."""
    section = bundle.section
    files = section.get("files")
    weights = section.get("weights") or []
    names = [section.get("graph"), *(weights if isinstance(weights, list) else [None])]
    for name in names:
        entry = files.get(name) if isinstance(files, dict) and isinstance(name, str) else None
        if not isinstance(entry, dict) or not file_is_unchanged(bundle.directory / str(name), entry):
            raise InputRefused(
                f"{bundle.directory / str(name)} is not the file that was exported",
                expected="the size and hash that exporter.json lists",
                todo="export again, or restore the file",
            )
