"""What stands between the blocks of a graph: which of its tensors these are is found, not known.

Exporters name a block's tensors alike but for the block's number. A name with a number for which every block has one
is a family; the family whose tensors are nearest to the states between the blocks of the model with the same weights is
it. The median over blocks decides, so that a fault in one block does not hide the others.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from exporter.parity.blocks import BlockModel
from exporter.parity.graphs import GraphSession
from exporter.parity.layers import States

Float32 = NDArray[np.float32]
NUMBER = re.compile(r"(?<![^./_])\d+(?![^./_])")
SAMPLE = 16  # tokens of the row on which the tensors are found
NEAR = 0.5  # a family further away (median relative squared error) is no family of states


@dataclass(frozen=True, slots=True)
class Boundaries:
    """Names of the tensors that stand before block 0, behind block 0, ..., behind the last block."""

    names: tuple[str, ...]


def find_boundaries(
    model: onnx.ModelProto, directory: Path, target: str, carried: BlockModel, row: Sequence[int]
) -> Boundaries | None:
    """None where the graph shows no such tensors: a graph that was optimized, or of another exporter."""
    row = list(row)[:SAMPLE]
    expected = _states(carried, row)
    produced = [name for node in model.graph.node for name in node.output if name]
    values = _run(model, directory, target, produced, row)
    found = {name: value[0] for name, value in values.items() if value.shape == (1, *expected[0].shape)}
    order = [name for name in produced if name in found]
    family = _nearest_family(order, found, expected)
    if family is None:
        return None
    names, inputs = family
    if inputs:  # the tensors before each block: the one behind the last is missing
        later = order[order.index(names[-1]) + 1 :]
        last = carried.run(carried.depth - 1, row, found[names[-1]])
        logits = values["logits"][0]
        end = min(
            later,
            key=lambda one: _error(found[one], last) * _error(carried.logits(row, found[one]), logits),
            default=None,
        )
        return Boundaries((*names, end)) if end else None
    earlier = order[: order.index(names[0])]
    start = min(earlier, key=lambda one: _error(found[one], expected[0]), default=None)
    return Boundaries((start, *names)) if start else None


def read_states(
    model: onnx.ModelProto, directory: Path, target: str, boundaries: Boundaries, rows: Sequence[Sequence[int]]
) -> States:
    """The tensors of `boundaries`, and the logits, for each row of token ids."""
    between, logits = [], []
    for row in rows:
        values = _run(model, directory, target, boundaries.names, row)
        between.append([values[name][0].astype(np.float32) for name in boundaries.names])
        logits.append(values["logits"][0])
    return States(between, logits)


def _states(carried: BlockModel, row: Sequence[int]) -> list[Float32]:
    states = [carried.embed(row)]
    for k in range(carried.depth):
        states.append(carried.run(k, row, states[-1]))
    return states


def _nearest_family(
    order: Sequence[str], found: dict[str, Float32], expected: Sequence[Float32]
) -> tuple[tuple[str, ...], bool] | None:
    """The family's names by block, and whether they stand before their blocks or behind them."""
    depth = len(expected) - 1
    families: dict[str, dict[int, str]] = {}
    for name in order:
        if match := NUMBER.search(name):
            template = f"{name[: match.start()]}#{name[match.end() :]}"
            families.setdefault(template, {})[int(match[0])] = name
    best: tuple[float, tuple[str, ...], bool] | None = None
    for members in families.values():
        if sorted(members) != list(range(depth)):
            continue
        names = tuple(members[k] for k in range(depth))
        for inputs in (True, False):
            wanted = expected[:-1] if inputs else expected[1:]
            error = float(np.median([_error(found[n], one) for n, one in zip(names, wanted, strict=True)]))
            if best is None or error < best[0]:
                best = error, names, inputs
    return None if best is None or best[0] > NEAR else best[1:]


def _error(value: Float32, wanted: Float32) -> float:
    """||value - wanted||^2 / ||wanted||^2, both less their means over the last axis."""
    a, b = (one.astype(np.float64) - one.mean(axis=-1, keepdims=True) for one in (value, wanted))
    error = float(((a - b) ** 2).sum() / max(float((b**2).sum()), np.finfo(np.float64).tiny))
    return error if np.isfinite(error) else np.inf


def _run(
    model: onnx.ModelProto, directory: Path, target: str, names: Sequence[str], row: Sequence[int]
) -> dict[str, NDArray]:
    """Values of tensors inside the graph, and the logits, for one row without a cache."""
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    present = {value.name for value in opened.graph.output}
    wanted = list(dict.fromkeys([*names, "logits"]))
    opened.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in present)
    return GraphSession(opened, directory, target).values(wanted, row)
