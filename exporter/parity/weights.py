"""Gates without a forward pass: is the adapter in the written weights, is each element right, the rest untouched?"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from exporter.errors import InputRefused
from exporter.graph.dequantize import dequantize
from exporter.graph.weights import Quantized, Weight
from exporter.merging.threads import single_threaded, thread_pool
from exporter.parity.bundles import Bundle, quantization_steps
from exporter.parity.gates import ProjectionLimits
from exporter.parity.oracle import Adapted, Oracle
from exporter.parity.result import GateResult, Outcome, Projection, number
from exporter.progress import SILENT, Progress, Task
from exporter.sources.tensors import FLOATS, TensorInfo
from exporter.sources.values import DTYPES, read_tensor

Float = NDArray[np.float64]
Rounding = tuple[str, ...]  # types that a value was rounded to, one after another
Rows = Callable[[slice], Float]  # some rows of a tensor that need not be there as a whole
CODE_ERROR = 2.0**-10  # in steps: float32 arithmetic when a weight is divided by its scale
IN_CACHE = 1 << 14  # numbers of an array that are looked at at once
SUM_ERROR = 2.0**-18  # of float32 sums of products, relative to the largest of a matrix
NUMPY = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F64": np.float64}


@dataclass(frozen=True, slots=True)
class ElementCheck:
    """Elements outside the bound, and how many there are."""

    wrong: int
    elements: int
    worst: float  # the largest distance beyond the bound, in units of the weight


@dataclass(frozen=True, slots=True)
class Fault:
    """A tensor that a gate failed. is_rounding: no element is further off than a few roundings of its type."""

    gate: str
    tensor: str
    is_rounding: bool


@dataclass(frozen=True, slots=True)
class WeightChecks:
    gates: list[GateResult]
    projections: list[Projection]
    faults: list[Fault]


def round_to(values: Float, *rounding: str) -> Float:
    """Correctly rounded (half to even) to each of the types in turn (safetensors names), back in float64."""
    with np.errstate(over="ignore"):
        for dtype in rounding:
            values = values.astype(NUMPY[dtype]).astype(np.float64)
    return values


def check_elements(stored: Float, adapted: Adapted, dtype: str) -> ElementCheck:
    """Is each stored element a correct rounding of some value within the float32 error of PEFT's float64 merge?

    Rounding is monotone, so that is round(W' - e) <= stored <= round(W' + e), with e the slack of the accumulation
    plus 2^-24 |W'| for the float32 sum that PEFT rounds from. That sum is itself the rounding where one LoRA is stored
    in float32: a last bit may then differ only where the slack touches a boundary. A value only replaced has e = 0.
    """
    wrong, worst = 0, 0.0
    for rows in row_blocks(stored):
        beyond = _beyond(stored[rows], adapted, (dtype,), rows)
        outside = ~(beyond <= 0)  # a NaN is wrong
        if outside.any():
            wrong, worst = wrong + int(outside.sum()), max(worst, float(beyond[outside].max()))
    return ElementCheck(wrong, stored.size, worst)


def _beyond(got: Float, adapted: Adapted, rounding: Rounding, rows: slice) -> Float:
    """How far some rows lie outside the bound of `check_elements`; nothing above 0 is right."""
    sum_is_stored = rounding == ("F32",) and adapted.is_sum and len(adapted.ranks) == 1
    sum_error = 0.0 if adapted.is_exact or sum_is_stored else 2.0**-24
    merged = adapted.merged[rows]
    error = adapted.slack[rows] + sum_error * np.abs(merged)
    low, high = round_to(merged - error, *rounding), round_to(merged + error, *rounding)
    return np.maximum(low - got, got - high)


def row_blocks(values: Float) -> Iterator[slice]:
    """Rows of an array, a few at a time: what is computed of them stays in a processor's cache."""
    size = max(1, values[0].size) if len(values) else 1
    step = max(1, IN_CACHE // size)
    for start in range(0, len(values), step):
        yield slice(start, start + step)


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


def _reported(projection: Projection) -> Projection:
    """Without what is not finite, which JSON cannot hold."""
    figures = {key: getattr(projection, key) for key in ("share", "error", "rounding")}
    return replace(projection, **{key: value if value is None else number(value) for key, value in figures.items()})


def check_weights(
    bundle: Bundle, oracle: Oracle, limits: ProjectionLimits, progress: Progress = SILENT
) -> WeightChecks:
    """Every weight gate of one bundle."""
    weights = canonical_weights(bundle, oracle)
    with progress.task("check the weights", len(oracle.expected_names | set(oracle.names)), "tensors") as task:
        return _checked(bundle, weights, oracle, limits, task)


def _checked(
    bundle: Bundle, weights: Mapping[str, Weight], oracle: Oracle, limits: ProjectionLimits, task: Task
) -> WeightChecks:
    projections: list[Projection] = []
    near: set[str] = set()
    outcomes: dict[str, list[tuple[str, Outcome]]] = {"elements": [], "projection": [], "step": []}
    for adapted in oracle.adapted():
        weight = weights.get(adapted.name)
        if weight is None:
            raise InputRefused(
                f"{bundle.graph} has no tensor {adapted.name!r}", expected="every weight the adapter changes"
            )
        stored = read_values(weight)
        if stored.shape != adapted.merged.shape:
            raise InputRefused(
                f"{adapted.name!r} has shape {stored.shape}",
                expected=f"{adapted.merged.shape}, as the adapter makes it",
            )
        if is_projected(weight, adapted):
            projection = project(stored.__getitem__, adapted)
            projections.append(_reported(projection))
            outcomes["projection"].append((adapted.name, judge_projection(projection, limits)))
        if isinstance(weight, Quantized):
            outcomes["step"].append((adapted.name, "PASS" if within_step(weight, stored, adapted.merged) else "FAIL"))
        else:
            roundings = allowed_roundings(weight, oracle.base_info(adapted.name), bundle.merge_dtype)
            right = elements_pass(stored.__getitem__, adapted, roundings)
            outcomes["elements"].append((adapted.name, "PASS" if right else "FAIL"))
            near |= {adapted.name} if is_near(stored, adapted, weight.dtype) else set()
        task.advance()
    untouched = _check_untouched(bundle, weights, oracle, task)
    outcomes["step"] += [entry for entry in untouched if isinstance(weights[entry[0]], Quantized)]
    same = [entry for entry in untouched if not isinstance(weights[entry[0]], Quantized)]
    source = "the base" if oracle.onto == "original" else "the base or what its int8 codes mean"
    gates = [
        _gate("weights.elements", outcomes["elements"], "elements are not a correct rounding of PEFT's merge"),
        _gate("weights.untouched", same, f"differ from {source}"),
        _gate("weights.step", outcomes["step"], "are further from the merged weight than their codes allow"),
        _projection_gate(projections, outcomes["projection"], limits),
        _onto_gate(weights, oracle, limits),
        _names_gate(weights, oracle),
    ]
    outcomes["untouched"] = same
    faults = [
        Fault(f"weights.{gate}", name, name in near)
        for gate, found in outcomes.items()
        for name, outcome in found
        if outcome == "FAIL"
    ]
    return WeightChecks([gate for gate in gates if gate is not None], projections, faults)


def is_near(stored: Float, adapted: Adapted, dtype: str) -> bool:
    """No element is further off than a few roundings of W, the change or their sum: not an error of merging."""
    unit = float(ml_dtypes.finfo(NUMPY[dtype]).eps)

    def near(rows: slice) -> bool:
        merged = adapted.merged[rows]
        size = np.maximum(np.abs(merged), np.abs(adapted.delta_of(rows)))
        return bool((np.abs(stored[rows] - merged) <= 2 * unit * size).all())

    return all(map(near, row_blocks(stored)))


def is_projected(weight: Weight, adapted: Adapted) -> bool:
    """A change is projected, where there is one: a target that training left at zero is judged by its elements alone.

    A replaced value is known to the last bit, and projected only where it was quantized.
    """
    if adapted.is_exact and not isinstance(weight, Quantized):
        return False
    return any(bool(adapted.delta_of(rows).any()) for rows in row_blocks(adapted.merged))


@dataclass(frozen=True, slots=True)
class OntoShare:
    """share: 0 for a merge onto the int8 codes, 1 for one onto the base's own weights; error: its standard error."""

    share: float
    error: float
    tensors: int

    def judge(self, limits: ProjectionLimits) -> Outcome:
        """As `judge_projection`, around 0."""
        if not self.error * limits.errors <= limits.blind:
            return "INCONCLUSIVE" if np.isfinite(self.share) else "FAIL"
        return "PASS" if abs(self.share) <= max(limits.share, limits.errors * self.error) else "FAIL"


def onto_share(weights: Mapping[str, Weight], oracle: Oracle, *, shifted: bool = False) -> OntoShare | None:
    """s = sum <What - W', q> / sum ||q||^2 over the weights that stand on int8 codes, with q = W - W_int8.

    W' is what the merge onto the codes must be, so that s is 0; a merge onto W itself leaves q standing. se from the
    residuals' mean squares. None where nothing stands on codes. shifted: of a bundle that is merged onto W.
    """
    numerator = denominator = variance = 0.0
    tensors = 0
    for name in oracle.int8_names:
        adapted = oracle.merge(name) if name in oracle.names else None
        if name not in weights or (adapted is not None and adapted.is_exact):
            continue
        onto = oracle.original(name).double().numpy()
        error = read_tensor(oracle.base_info(name)).double().numpy() - onto
        residual = read_values(weights[name]) - (onto if adapted is None else adapted.merged)
        if shifted:
            residual = residual + error
        square = float(np.vdot(error, error))
        numerator += float(np.vdot(residual, error))
        share = float(np.vdot(residual, error)) / square if square else 0.0
        denominator += square
        variance += float(np.mean((residual - share * error) ** 2)) * square
        tensors += 1
    if not denominator:
        return None
    return OntoShare(numerator / denominator, float(np.sqrt(variance)) / denominator, tensors)


def _onto_gate(weights: Mapping[str, Weight], oracle: Oracle, limits: ProjectionLimits) -> GateResult | None:
    found = onto_share(weights, oracle)
    if found is None:
        return None
    outcome, limit = found.judge(limits), max(limits.share, limits.errors * found.error)
    detail = f"share of the base's own weights {found.share:.4f} with se {found.error:.2g}"
    if outcome == "FAIL":
        detail = f"the merge does not stand on the base's int8 codes: {detail}"
    return _result("weights.onto", outcome, abs(found.share), limit, found.tensors, detail)


def canonical_weights(bundle: Bundle, oracle: Oracle) -> dict[str, Weight]:
    return {oracle.canonical(name): weight for name, weight in bundle.weights.items()}


def read_values(weight: Weight) -> Float:
    """A weight's values in float64, dequantized where it is quantized."""
    tensor = dequantize(weight) if isinstance(weight, Quantized) else read_tensor(weight)
    return tensor.double().numpy()


def allowed_roundings(weight: TensorInfo, base: TensorInfo, merge_dtype: str | None) -> list[Rounding]:
    """To the stored type alone, or first to what the merge made of it: `merge_dtype`, or the base's own type."""
    between = merge_dtype or base.dtype
    alone: Rounding = (weight.dtype,)
    if between == weight.dtype or not {between, weight.dtype} <= FLOATS:
        return [alone]
    return [alone, (between, weight.dtype)]


def elements_pass(stored: Rows, adapted: Adapted, roundings: Sequence[Rounding]) -> bool:
    """True if all elements are right for one of the roundings: a tensor takes one way, never a mixture."""
    return any(
        all(bool((_beyond(stored(rows), adapted, rounding, rows) <= 0).all()) for rows in row_blocks(adapted.merged))
        for rounding in roundings
    )


def within_step(weight: Quantized, stored: Float, wanted: Float) -> bool:
    """Every element at its nearest code: within half a step of `wanted`, and half a step of what it was rounded to.

    What was quantized is the merge as stored, at worst in bfloat16: that is up to 2^-9 |W'| from `wanted`, which may
    turn a code. An element that is clipped at an end of its range may lie further out.
    Clipping only ever pulls a weight inwards, and by at most half of its range: an edited scale does neither.
    bitsandbytes gives a row of zeros the scale 0. Its step is then what float32 loses of the adapter's sum beside it.
    """
    steps, clipped = (np.broadcast_to(tensor.numpy(), stored.shape) for tensor in quantization_steps(weight))
    largest = max(wanted.max(initial=0), -wanted.min(initial=0))
    smallest = max(np.finfo(np.float32).tiny, SUM_ERROR * float(largest))

    def within(rows: slice) -> bool:
        got, want, step = stored[rows], wanted[rows], steps[rows]
        size, unit = np.abs(want), np.where(step > 0, step, smallest)
        distance = np.abs(got - want)
        nearest = np.minimum((0.5 + CODE_ERROR) * unit + 2.0**-9 * size, unit)
        far = ~(distance <= np.where(step > 0, nearest, unit))  # a NaN is far
        if not far.any():
            return True
        inward = clipped[rows][far] & (size[far] >= np.abs(got[far]))
        return bool((inward & (distance[far] <= (1 << (weight.bits - 1)) * unit[far])).all())

    return all(map(within, row_blocks(stored)))


def _check_untouched(
    bundle: Bundle, weights: Mapping[str, Weight], oracle: Oracle, task: Task
) -> list[tuple[str, Outcome]]:
    """Weights that no adapter changes: equal bytes, or the exact conversion where the type differs.

    Onto int8, what the codes mean, rounded once.
    """
    expected = sorted(oracle.expected_names - set(oracle.names))
    names = [name for name in expected if name in weights]
    task.advance(len(expected) - len(names))

    def right(name: str) -> bool:
        original, on_codes = oracle.original(name), name in oracle.int8_names
        return untouched(weights[name], original, oracle.base_info(name), bundle.merge_dtype, on_codes=on_codes)

    results: list[tuple[str, Outcome]] = []
    with single_threaded(), thread_pool() as pool:
        for name, found in zip(names, pool.map(right, names), strict=True):
            results.append((name, "PASS" if found else "FAIL"))
            task.advance()
    return results


def untouched(
    weight: Weight, original: torch.Tensor, base: TensorInfo, merge_dtype: str | None, *, on_codes: bool
) -> bool:
    """Is `weight` what stands in the base? original: the base's values, or what their codes mean (float32)."""
    if weight.shape != base.shape:
        return False
    if isinstance(weight, Quantized):
        return within_step(weight, read_values(weight), original.double().numpy())
    stored, roundings = read_tensor(weight), allowed_roundings(weight, base, merge_dtype)
    if on_codes:
        values = original.double().numpy()
        return any(np.array_equal(stored.double().numpy(), round_to(values, *rounding)) for rounding in roundings)
    if weight.dtype not in FLOATS or base.dtype not in FLOATS:
        return torch.equal(stored, original)
    return any(_bytes(stored) == _bytes(_converted(original, rounding)) for rounding in roundings)


def _converted(values: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    for dtype in rounding:
        values = values.to(DTYPES[dtype])
    return values


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _names_gate(weights: Mapping[str, Weight], oracle: Oracle) -> GateResult:
    """Nothing missing, nothing added: the base's parameters, less buffers of old files; a tied head may be left out."""
    expected = oracle.expected_names
    missing = sorted(expected - weights.keys())
    added = sorted(weights.keys() - expected - oracle.optional_names)
    outcome: list[tuple[str, Outcome]] = []
    outcome.extend((name, "FAIL") for name in [*missing, *added])
    outcome.extend((name, "PASS") for name in expected & weights.keys())
    gate = _gate("weights.names", outcome, "are missing or foreign")
    assert gate is not None
    return gate


def _projection_gate(
    projections: list[Projection], outcomes: list[tuple[str, Outcome]], limits: ProjectionLimits
) -> GateResult | None:
    """The gate over all targets, with the worst share as its figure."""
    gate = _gate("weights.projection", outcomes, "do not carry the adapter's change once")
    known = [(abs(p.share - 1), p.error, p) for p in projections if p.share is not None and p.error is not None]
    if gate is None or not known:
        return gate
    away, error, worst = max(known, key=lambda entry: entry[0])
    note = f"worst: {worst.tensor}, share {worst.share:.4f} with se {error:.2g}"
    limit = max(limits.share, limits.errors * error)
    return replace(gate, estimate=away, limit=limit, detail=f"{gate.detail}; {note}")


def _gate(gate: str, outcomes: list[tuple[str, Outcome]], fault: str) -> GateResult | None:
    """One exact gate over tensors; None where the bundle has nothing of the kind."""
    if not outcomes:
        return None
    failed = [name for name, outcome in outcomes if outcome == "FAIL"]
    blind = [name for name, outcome in outcomes if outcome == "INCONCLUSIVE"]
    if failed:
        detail = f"{len(failed)} of {len(outcomes)} tensors {fault}: {', '.join(failed[:4])}"
        return _result(gate, "FAIL", len(failed), 0.0, len(outcomes), detail)
    if blind:
        detail = f"rounding hides the adapter in {len(blind)} of {len(outcomes)} tensors: {', '.join(blind[:4])}"
        return _result(gate, "INCONCLUSIVE", len(blind), 0.0, len(outcomes), detail)
    return _result(gate, "PASS", 0.0, 0.0, len(outcomes), "")


def _result(gate: str, outcome: Outcome, estimate: float, limit: float, tensors: int, detail: str) -> GateResult:
    return GateResult(
        gate=gate,
        pair="T-W",
        statistic=gate.rpartition(".")[2],
        scope="weights",
        outcome=outcome,
        kind="correctness",
        estimate=number(estimate),
        lower=None,
        upper=None,
        limit=number(limit),
        bound="exact",
        tokens=0,
        documents=0,
        detail="; ".join(filter(None, (f"{tensors} tensors", detail))),
    )
