"""Gates without a forward pass: is the adapter in the written weights, is each element right, the rest untouched?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from exporter.errors import InputRefused
from exporter.graph.weights import Quantized, Weight, dequantize
from exporter.parity.bundles import Bundle, quantization_steps
from exporter.parity.gates import ProjectionLimits
from exporter.parity.oracle import Adapted, Oracle
from exporter.parity.result import GateResult, Outcome, Projection
from exporter.sources.checkpoint import TensorInfo, read_tensor
from exporter.sources.tensors import FLOATS

Float = NDArray[np.float64]
NUMPY = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F64": np.float64}


@dataclass(frozen=True, slots=True)
class ElementCheck:
    """Elements outside the bound, and how many there are."""

    wrong: int
    elements: int
    worst: float  # the largest distance beyond the bound, in units of the weight


def round_to(values: Float, dtype: str) -> Float:
    """Correctly rounded (half to even) to the stored type `dtype` (safetensors name), back in float64."""
    with np.errstate(over="ignore"):
        return values.astype(NUMPY[dtype]).astype(np.float64)


def check_elements(stored: Float, adapted: Adapted, dtype: str) -> ElementCheck:
    """Is each stored element a correct rounding of some value within the float32 error of PEFT's float64 merge?

    Rounding is monotone, so that is round(W' - e) <= stored <= round(W' + e), with e the slack of the accumulation
    plus 2^-24 |W'| for the float32 sum that PEFT rounds from.
    """
    error = adapted.slack + 2.0**-24 * np.abs(adapted.merged)
    low, high = round_to(adapted.merged - error, dtype), round_to(adapted.merged + error, dtype)
    beyond = np.maximum(low - stored, stored - high)
    wrong = ~(beyond <= 0)  # a NaN is wrong
    return ElementCheck(int(wrong.sum()), stored.size, float(beyond[wrong].max()) if wrong.any() else 0.0)


def project(stored: Float, adapted: Adapted) -> Projection:
    """s = <What - W, delta> / ||delta||^2, and its standard error rms(What - W - delta) / ||delta||."""
    delta, original = adapted.delta, adapted.original
    norm = float(np.linalg.norm(delta))
    relative = norm / max(float(np.linalg.norm(original)), np.finfo(np.float64).tiny)
    if norm == 0:
        return Projection(adapted.name, None, None, relative, None)
    change = stored - original
    residual = change - delta
    share = float(np.vdot(change, delta)) / norm**2
    error = float(np.sqrt(np.mean(residual**2))) / norm
    return Projection(adapted.name, share, error, relative, float(np.linalg.norm(residual)) / norm)


def judge_projection(projection: Projection, limits: ProjectionLimits) -> Outcome:
    """FAIL also where a value is NaN; INCONCLUSIVE where rounding noise hides the adapter."""
    if projection.share is None or projection.error is None:
        return "INCONCLUSIVE"
    if projection.error * limits.errors > limits.blind:
        return "INCONCLUSIVE"
    return "PASS" if abs(projection.share - 1) <= max(limits.share, limits.errors * projection.error) else "FAIL"


def check_weights(
    bundle: Bundle, oracle: Oracle, limits: ProjectionLimits
) -> tuple[list[GateResult], list[Projection]]:
    """Every weight gate of one bundle."""
    weights = canonical_weights(bundle, oracle)
    projections: list[Projection] = []
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
                f"{adapted.name!r} has shape {stored.shape}", expected=f"{adapted.merged.shape}, as in the base"
            )
        projection = project(stored, adapted)
        projections.append(projection)
        outcomes["projection"].append((adapted.name, judge_projection(projection, limits)))
        if isinstance(weight, Quantized):
            outcomes["step"].append((adapted.name, "PASS" if within_step(weight, stored, adapted.merged) else "FAIL"))
        else:
            outcomes["elements"].append((adapted.name, _elements_outcome(weight, stored, adapted, oracle)))
    untouched = _check_untouched(weights, oracle)
    outcomes["step"] += [entry for entry in untouched if isinstance(weights[entry[0]], Quantized)]
    same = [entry for entry in untouched if not isinstance(weights[entry[0]], Quantized)]
    gates = [
        _gate("weights.elements", outcomes["elements"], "elements are not a correct rounding of PEFT's merge"),
        _gate("weights.untouched", same, "differ from the base"),
        _gate("weights.step", outcomes["step"], "are further than one quantization step from the merged weight"),
        _projection_gate(projections, outcomes["projection"], limits),
        _names_gate(weights, oracle),
    ]
    return [gate for gate in gates if gate is not None], projections


def canonical_weights(bundle: Bundle, oracle: Oracle) -> dict[str, Weight]:
    return {oracle.canonical(name): weight for name, weight in bundle.weights.items()}


def read_values(weight: Weight) -> Float:
    """A weight's values in float64, dequantized where it is quantized."""
    tensor = dequantize(weight) if isinstance(weight, Quantized) else read_tensor(weight)
    return tensor.double().numpy()


def allowed_types(weight: TensorInfo, base: TensorInfo) -> list[str]:
    """Types that the merge may have rounded to: the stored one, or the base's where the bundle widened it."""
    wider = NUMPY[weight.dtype]().itemsize > NUMPY[base.dtype]().itemsize
    return [weight.dtype, base.dtype] if wider else [weight.dtype]


def elements_pass(stored: Float, adapted: Adapted, types: Sequence[str]) -> bool:
    """True if all elements are right for one of the types: a tensor is rounded to one type, never a mixture."""
    return any(check_elements(stored, adapted, dtype).wrong == 0 for dtype in types)


def within_step(weight: Quantized, stored: Float, wanted: Float) -> bool:
    """Every element within one step of `wanted`; one that is clipped at an end of its range may lie further out.

    Clipping only ever pulls a weight inwards, and by at most half of its range: an edited scale does neither.
    """
    steps, clipped = (tensor.numpy() for tensor in quantization_steps(weight))
    distance = np.abs(stored - wanted) / steps
    inward = clipped & (np.abs(wanted) >= np.abs(stored)) & (distance <= 1 << (weight.bits - 1))
    return bool(np.isfinite(stored).all() and ((distance <= 1) | inward).all())


def _elements_outcome(weight: Weight, stored: Float, adapted: Adapted, oracle: Oracle) -> Outcome:
    assert not isinstance(weight, Quantized)
    base = oracle.base.tensors[oracle.base_tensor(adapted.name)]
    return "PASS" if elements_pass(stored, adapted, allowed_types(weight, base)) else "FAIL"


def _check_untouched(weights: Mapping[str, Weight], oracle: Oracle) -> list[tuple[str, Outcome]]:
    """Weights that no adapter changes: equal bytes, or the exact conversion where the type differs."""
    changed = set(oracle.names)
    results: list[tuple[str, Outcome]] = []
    for base_name, info in oracle.base.tensors.items():
        name = oracle.canonical(base_name)
        if name in changed or name not in weights:
            continue
        results.append((name, "PASS" if _untouched(weights[name], info) else "FAIL"))
    return results


def _untouched(weight: Weight, base: TensorInfo) -> bool:
    if weight.shape != base.shape:
        return False
    original = read_tensor(base)
    if isinstance(weight, Quantized):
        return within_step(weight, read_values(weight), original.double().numpy())
    stored = read_tensor(weight)
    if weight.dtype != base.dtype and weight.dtype in FLOATS:
        original = original.to(stored.dtype)
    if weight.dtype == base.dtype:
        return _bytes(stored) == _bytes(original)
    return torch.equal(stored, original)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _names_gate(weights: Mapping[str, Weight], oracle: Oracle) -> GateResult:
    """Nothing missing, nothing added: the base's parameters, less buffers of old files and a tied head."""
    expected = {oracle.canonical(name) for name in oracle.base.tensors} & oracle.parameters
    tied = {"lm_head.weight"}
    missing = sorted(expected - weights.keys() - tied)
    added = sorted(weights.keys() - expected - tied)
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
        estimate=float(estimate),
        lower=None,
        upper=None,
        limit=limit,
        bound="exact",
        tokens=0,
        documents=0,
        detail="; ".join(filter(None, (f"{tensors} tensors", detail))),
    )
