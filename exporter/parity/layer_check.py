"""The layers of one bundle: its weights against the truth's, and its graph against its own weights."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from exporter.parity.blocks import BlockModel, Unsupported
from exporter.parity.bundles import Bundle
from exporter.parity.documents import Document, Level
from exporter.parity.graph_ranges import graph_nbytes
from exporter.parity.graph_states import find_boundaries, read_states
from exporter.parity.graphs import full_precision
from exporter.parity.layers import compare_layers, graph_errors
from exporter.parity.result import Layer, number
from exporter.progress import SILENT, Progress
from exporter.runtime.memory import free_memory

# Documents and tokens of each: a swap costs a whole model, and each layer has one.
SAMPLES: dict[Level, tuple[int, int]] = {"commit": (2, 32), "nightly": (4, 64), "release": (8, 64)}
HEADROOM = 1.5


def layer_errors(
    truth: Callable[[], BlockModel],
    carried: Callable[[], BlockModel],
    bundle: Bundle,
    documents: Sequence[Document],
    level: Level,
    progress: Progress = SILENT,
) -> tuple[tuple[Layer, ...], str]:
    """Every part's errors, and what has to be said about them: why there are none, or none of the graph."""
    count, length = SAMPLES[level]
    rows = [one.tokens[:length] for one in sorted(documents, key=lambda one: -len(one.tokens))[:count]]
    try:
        ours, theirs = truth(), carried()
        layers = compare_layers(ours, theirs, rows, progress)
    except Unsupported as reason:
        return (), f"no errors by layer: {reason}"
    graph = full_precision(bundle.model())
    if graph_nbytes(graph) * HEADROOM > free_memory(bundle.target):
        return tuple(layers), "the graph was not compared by layer: it does not fit into memory"
    boundaries = find_boundaries(graph, bundle.directory, bundle.target, theirs, rows[0])
    if boundaries is None:
        return tuple(layers), "the graph was not compared by layer: it names no tensors between blocks"
    states = read_states(graph, bundle.directory, bundle.target, boundaries, rows)
    errors = graph_errors(theirs, states, rows)
    return tuple(replace(layer, graph=number(error)) for layer, error in zip(layers, errors, strict=True)), ""
