"""Whole where it fits into free memory with room to spare, else block by block: the logits are the same."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx

from exporter.parity.blocks import BlockModel, Unsupported
from exporter.parity.blocks_scoring import BlockScorer, SweptScorer, sweep
from exporter.parity.graph_ranges import RangedGraph, RangedScorer, graph_nbytes
from exporter.parity.graphs import Graph, GraphSession
from exporter.parity.memory import OVERHEAD, require_memory
from exporter.parity.models import release
from exporter.parity.scoring import LogitStore, Scorer
from exporter.progress import SILENT, Progress
from exporter.runtime.memory import free_memory

Memory = Literal["auto", "whole", "blocks"]
SPARE = 1.5  # of a model's own size: it leaves room for what else a run holds


@dataclass(frozen=True, slots=True)
class Fp32Model:
    """T, M32, B or F before it is loaded. nbytes: of its weights in float32."""

    name: str
    whole: Callable[[], Scorer]
    blocks: Callable[[], BlockModel]
    nbytes: int
    content: str = ""  # what tells it from another model of its name


def runs_by_block(memory: Memory, nbytes: int) -> bool:
    """What `memory` asks for, or, for auto, whether `nbytes` of weights are too many for what is free now."""
    return memory == "blocks" or (memory == "auto" and nbytes * SPARE > free_memory("cpu"))


def score_fp32(store: LogitStore, model: Fp32Model, memory: Memory, progress: Progress = SILENT) -> None:
    """Put the model's logits into the store, unless an earlier run has done so. EnvironmentLacking before it loads."""
    if store.has(model.name, model.content):
        progress.note(f"score {model.name}: done before")
    elif not runs_by_block(memory, model.nbytes) or not _score_by_block(store, model, progress):
        store.score(model.name, model.whole(), progress, model.content)
    release()


def open_scorer(model: Fp32Model, memory: Memory, progress: Progress = SILENT) -> Scorer:
    """The model for tokens that are in no store: a call to one that runs block by block loads every block."""
    if runs_by_block(memory, model.nbytes):
        try:
            return BlockScorer(_open(model))
        except Unsupported as reason:
            progress.note(f"{model.name} is loaded whole: {reason}")
    return model.whole()


def _score_by_block(store: LogitStore, model: Fp32Model, progress: Progress) -> bool:
    """False where the model does not allow it."""
    directory = store.path(model.name, model.content).with_suffix(".states")
    try:
        opened = _open(model)
        states = sweep(opened, store.documents, directory, f"score {model.name}", progress)
        store.score(model.name, SweptScorer(opened, states, store.documents), progress, model.content)
    except Unsupported as reason:
        progress.note(f"{model.name} is loaded whole: {reason}")
        return False
    finally:
        release()
    shutil.rmtree(directory)
    return True


def _open(model: Fp32Model) -> BlockModel:
    opened = model.blocks()
    require_memory((opened.stem_bytes + opened.block_bytes) * OVERHEAD, f"{model.name}, one block at a time,")
    return opened


@dataclass(frozen=True, slots=True)
class GraphPlace:
    """Where a bundle's graphs run: its directory with the weights, and a scratch directory for what needs one."""

    directory: Path
    target: str
    scratch: Path
    memory: Memory
    progress: Progress = SILENT

    def is_ranged(self, model: onnx.ModelProto) -> bool:
        """True for a graph that does not fit into free memory."""
        return runs_by_block(self.memory, graph_nbytes(model))

    def open(self, model: onnx.ModelProto) -> Graph:
        if self.is_ranged(model):
            return RangedGraph(model, self.directory, self.target, self.scratch, self.progress)
        return GraphSession(model, self.directory, self.target)

    def score(self, store: LogitStore, name: str, model: onnx.ModelProto, content: str) -> None:
        """The graph's logits into the store, unless an earlier run has done so."""
        if store.has(name, content):
            self.progress.note(f"score {name}: done before")
            return
        graph = self.open(model)
        scorer = RangedScorer(graph, store.documents) if isinstance(graph, RangedGraph) else graph
        store.score(name, scorer, self.progress, content)
