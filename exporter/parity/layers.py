"""Where along the model an error stands: each part alone, all parts up to it, and the model with one part put right.

A part is the embeddings, one decoder block, or the head with its norm. T is the truth, F transformers over the bundle's
weights, both run block by block (`blocks`), so that no architecture is known here. All of it on a few short documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exporter.parity.blocks import BlockModel
from exporter.parity.result import Layer, number
from exporter.parity.statistics import kl_divergence, log_softmax
from exporter.progress import SILENT, Progress

Float32 = NDArray[np.float32]
EMBEDDINGS, HEAD = "embeddings", "head"
Rows = Sequence[Sequence[int]]


def block_name(index: int) -> str:
    return f"block {index}"


@dataclass(frozen=True, slots=True)
class States:
    """What stands between the parts of one model: for each document, `between[k]` (T, E) is what part k gave."""

    between: list[list[Float32]]  # embeddings, block 0, ...
    logits: list[Float32]  # (T, V) of each document


def compare_layers(truth: BlockModel, carried: BlockModel, rows: Rows, progress: Progress = SILENT) -> list[Layer]:
    """Local error, accumulated error and swap of every part; `graph` is left out. rows: token ids of a few documents.

    Each block of each model is loaded once. The swaps are carried along: one stream of states per part put right, all
    of them through a block together.
    """
    depth = truth.depth
    local, accumulated = np.full(depth + 2, np.nan), np.full(depth + 2, np.nan)
    ours, theirs = [truth.embed(row) for row in rows], [carried.embed(row) for row in rows]
    local[0] = accumulated[0] = _relative(theirs, ours, ours)
    swaps = _each(ours)  # (k, T, E) of each document: the carried model's, with part k the truth's
    with progress.task("layers", depth, "blocks") as task:
        for k in range(depth):
            right = [truth.run(k, row, state) for row, state in zip(rows, ours, strict=True)]
            mended = [truth.run(k, row, state) for row, state in zip(rows, theirs, strict=True)]
            # The carried model's own states, the truth's, and every swap.
            given = [np.concatenate(parts) for parts in zip(_each(theirs), _each(ours), swaps, strict=True)]
            made = [carried.run_all(k, row, states) for row, states in zip(rows, given, strict=True)]
            theirs, alone = ([states[i] for states in made] for i in (0, 1))
            added = [after - before for after, before in zip(right, ours, strict=True)]
            local[k + 1] = _relative(alone, right, added)
            swaps = [np.concatenate([states[2:], new[None]]) for states, new in zip(made, mended, strict=True)]
            ours = right
            accumulated[k + 1] = _relative(theirs, ours, ours)
            task.advance()
    target = [truth.logits(row, state) for row, state in zip(rows, ours, strict=True)]
    whole = [carried.logits(row, state) for row, state in zip(rows, theirs, strict=True)]
    alone = [carried.logits(row, state) for row, state in zip(rows, ours, strict=True)]
    local[-1] = _relative(_centered(alone), _centered(target), _centered(target))
    accumulated[-1] = _relative(_centered(whole), _centered(target), _centered(target))
    without = [
        [carried.logits(row, states[k]) for row, states in zip(rows, swaps, strict=True)] for k in range(depth + 1)
    ]
    without.append([truth.logits(row, state) for row, state in zip(rows, theirs, strict=True)])
    distance = _kl(target, whole)
    gone = [1 - _kl(target, one) / distance if distance > 0 else np.nan for one in without]
    names = [EMBEDDINGS, *map(block_name, range(depth)), HEAD]
    figures = zip(names, local, accumulated, gone, strict=True)
    return [Layer(name, number(a), number(b), number(c), None) for name, a, b, c in figures]


def graph_errors(carried: BlockModel, states: States, rows: Rows) -> list[float]:
    """Each part of a graph against transformers over the same weights, given the graph's own input of that part."""
    depth = carried.depth
    embedded = [carried.embed(row) for row in rows]
    found = [_relative([one[0] for one in states.between], embedded, embedded)]
    for k in range(depth):
        right = [carried.run(k, row, one[k]) for row, one in zip(rows, states.between, strict=True)]
        added = [after - one[k] for after, one in zip(right, states.between, strict=True)]
        found.append(_relative([one[k + 1] for one in states.between], right, added))
    right = [carried.logits(row, one[depth]) for row, one in zip(rows, states.between, strict=True)]
    found.append(_relative(_centered(states.logits), _centered(right), _centered(right)))
    return found


def _each(states: Sequence[Float32]) -> list[Float32]:
    return [one[None] for one in states]


def _relative(wrong: Sequence[Float32], right: Sequence[Float32], scale: Sequence[Float32]) -> float:
    """sum ||wrong - right||^2 / sum ||scale||^2 over documents."""
    error = sum(float(((a.astype(np.float64) - b) ** 2).sum()) for a, b in zip(wrong, right, strict=True))
    size = sum(float((one.astype(np.float64) ** 2).sum()) for one in scale)
    return error / size if size > 0 else float("nan")


def _centered(logits: Sequence[Float32]) -> list[Float32]:
    return [one - one.mean(axis=-1, keepdims=True) for one in logits]


def _kl(target: Sequence[Float32], other: Sequence[Float32]) -> float:
    """Mean KL over all positions of all documents."""
    parts = [kl_divergence(log_softmax(a), log_softmax(b)) for a, b in zip(target, other, strict=True)]
    return float(np.concatenate(parts).mean())
