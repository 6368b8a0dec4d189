"""What a faulty merge would add to a weight instead of the adapter's change."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from exporter.parity.elements import Float, Rows
from exporter.parity.oracle import Adapted


@dataclass(frozen=True, slots=True)
class MergeMutation:
    """`change(adapted, next)` gives rows of the delta that the faulty merge would add, or why there is none."""

    name: str
    change: Callable[[Adapted, Adapted | None], Rows | str]


def merge_mutations(adapted: Sequence[Adapted] = ()) -> list[MergeMutation]:
    """The mutations of every merge, and those of what is among `adapted`: DoRA, replaced values."""
    mutations = [
        MergeMutation("adapter dropped", lambda a, _: lambda rows: np.zeros_like(a.merged[rows])),
        MergeMutation("scale x 0.5", lambda a, _: _times(0.5, a)),
        MergeMutation("scale x 0.9", lambda a, _: _times(0.9, a)),
        MergeMutation("scale x 2", lambda a, _: _times(2, a)),
        MergeMutation("alpha instead of alpha / r", _alpha_alone),
        MergeMutation("merged twice", lambda a, _: lambda rows: a.delta_of(rows) + a.delta_of(rows)),
        MergeMutation("layers shuffled", _next_layer),
        MergeMutation("q, k, v swapped", _thirds_swapped),
        MergeMutation("transposed", _transposed),
        MergeMutation("rows shuffled", lambda a, _: _rolled(a, 1)),
    ]
    if any(one.plain is not None for one in adapted):
        mutations.append(MergeMutation("magnitude left out", _without_magnitude))
    if any(one.is_exact for one in adapted):
        mutations.append(MergeMutation("one replaced row reverted", _row_reverted))
    return mutations


def _times(factor: float, adapted: Adapted) -> Rows:
    return lambda rows: factor * adapted.delta_of(rows)


def _rolled(adapted: Adapted, shift: int) -> Rows:
    """Rows of np.roll(delta, shift, axis=0)."""

    def rolled(rows: slice) -> Float:
        at = np.arange(len(adapted.merged))[rows] - shift
        return adapted.merged.take(at, 0, mode="wrap") - adapted.original.take(at, 0, mode="wrap")

    return rolled


def _alpha_alone(adapted: Adapted, _: Adapted | None) -> Rows | str:
    if not adapted.alphas:
        return f"{adapted.name}: no alpha"
    if len(adapted.ranks) != 1:
        return "several adapters: no single alpha"
    if adapted.alphas[0] == adapted.scalings[0]:
        return f"alpha / r = alpha: r = {adapted.ranks[0]}"
    return _times(adapted.alphas[0] / adapted.scalings[0], adapted) if adapted.scalings[0] else "the scaling is 0"


def _next_layer(adapted: Adapted, other: Adapted | None) -> Rows | str:
    if other is None:
        return "one target: nothing to shuffle with"
    if other.merged.shape != adapted.merged.shape:
        return f"{adapted.name} and {other.name} differ in shape: {adapted.merged.shape}, {other.merged.shape}"
    return other.delta_of


def _thirds_swapped(adapted: Adapted, _: Adapted | None) -> Rows | str:
    """k|v|q instead of q|k|v, along the columns or the rows."""
    shape = adapted.merged.shape
    if len(shape) != 2:
        return f"{adapted.name} {shape} is no matrix"
    rows, columns = shape
    if columns == 3 * rows:
        return lambda some: np.roll(adapted.delta_of(some), -rows, axis=1)
    return _rolled(adapted, -columns) if rows == 3 * columns else f"{adapted.name} {shape} is no packed q|k|v"


def _transposed(adapted: Adapted, _: Adapted | None) -> Rows | str:
    shape = adapted.merged.shape
    if len(shape) != 2 or shape[0] != shape[1]:
        return f"{adapted.name} {shape} is not square"
    return lambda rows: adapted.merged.T[rows] - adapted.original.T[rows]


def _without_magnitude(adapted: Adapted, _: Adapted | None) -> Rows | str:
    plain = adapted.plain
    return f"{adapted.name}: no magnitude" if plain is None else lambda rows: plain[rows] - adapted.original[rows]


def _row_reverted(adapted: Adapted, _: Adapted | None) -> Rows | str:
    """The row (or number) that the adapter changed most is the base's again."""
    if not adapted.is_exact:
        return f"{adapted.name} is not replaced"
    delta = adapted.delta
    size = np.abs(delta) if delta.ndim == 1 else np.linalg.norm(delta.reshape(len(delta), -1), axis=1)
    delta[size.argmax()] = 0
    return delta.__getitem__
