"""How much of the adapter's change a written weight carries, and whether rounding lets anybody tell."""

import numpy as np

from exporter.graph.weights import Quantized, Weight
from exporter.parity.elements import Float, Rows, row_blocks
from exporter.parity.gates import ProjectionLimits
from exporter.parity.oracle import Adapted
from exporter.parity.result import Outcome, Projection


def is_projected(weight: Weight, adapted: Adapted) -> bool:
    """A change is projected, where there is one: a target that training left at zero is judged by its elements alone.

    A replaced value is known to the last bit, and projected only where it was quantized.
    """
    if adapted.is_exact and not isinstance(weight, Quantized):
        return False
    return any(bool(adapted.delta_of(rows).any()) for rows in row_blocks(adapted.merged))


def project(stored: Rows, adapted: Adapted) -> Projection:
    """s = <What - W, delta> / ||delta||^2, and its standard error rms(What - W - delta) / ||delta||.

    Where delta depends on W (IA3, DoRA, replaced values), both sides are taken without their part along W' and W'^3:
    the noise of a quantization has such a part, for it shrinks large weights, and would pass for a part of the change.
    """
    if adapted.is_sum:
        return _project_rows(stored, adapted)
    delta, original = adapted.delta, adapted.original
    whole = stored(slice(None))
    norm = float(np.linalg.norm(delta))
    relative = norm / max(float(np.linalg.norm(original)), np.finfo(np.float64).tiny)
    if norm == 0:
        return Projection(adapted.name, None, None, relative, None)
    delta, change = _without(delta, adapted.merged), _without(whole - original, adapted.merged)
    norm = float(np.linalg.norm(delta))
    if norm == 0:
        return Projection(adapted.name, None, None, relative, None)
    residual = change - delta
    share = float(np.vdot(change, delta)) / norm**2
    error = float(np.sqrt(np.mean(residual**2))) / norm
    return Projection(adapted.name, share, error, relative, float(np.linalg.norm(residual)) / norm)


def _project_rows(stored: Rows, adapted: Adapted) -> Projection:
    """`project` where delta does not depend on W: sums over a few rows at a time."""
    product = squares = of_original = of_residual = 0.0
    for rows in row_blocks(adapted.merged):
        original = adapted.original[rows]
        delta, change = adapted.merged[rows] - original, stored(rows) - original
        product += _dot(change, delta)
        squares += _dot(delta, delta)
        of_original += _dot(original, original)
        change -= delta
        of_residual += _dot(change, change)
    relative = float(np.sqrt(squares)) / max(float(np.sqrt(of_original)), np.finfo(np.float64).tiny)
    if squares == 0:
        return Projection(adapted.name, None, None, relative, None)
    error = float(np.sqrt(of_residual / adapted.merged.size / squares))
    return Projection(adapted.name, product / squares, error, relative, float(np.sqrt(of_residual / squares)))


def _dot(x: Float, y: Float) -> float:
    """The sum of products. BLAS would start its threads for each few rows, which takes longer than the sum."""
    return float(np.einsum("i,i->", x.ravel(), y.ravel()))


def _without(values: Float, merged: Float) -> Float:
    """`values` less their least-squares part along W' and W'^3."""
    scale = float(np.abs(merged).max()) or 1.0
    line = (merged / scale).ravel()
    basis, _ = np.linalg.qr(np.stack([line, line**3], axis=1))
    flat = values.ravel()
    return (flat - basis @ (basis.T @ flat)).reshape(values.shape)


def judge_projection(projection: Projection, limits: ProjectionLimits) -> Outcome:
    """FAIL also where a value is not finite; INCONCLUSIVE where rounding noise hides the adapter."""
    if projection.share is None or projection.error is None:
        return "INCONCLUSIVE"
    if not (np.isfinite(projection.share) and np.isfinite(projection.error)):
        return "FAIL"
    if projection.error * limits.errors > limits.blind:
        return "INCONCLUSIVE"
    return "PASS" if abs(projection.share - 1) <= max(limits.share, limits.errors * projection.error) else "FAIL"
