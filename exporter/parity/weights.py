"""Gates without a forward pass: is the adapter in the written weights, is each element right, the rest untouched?"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from exporter.errors import InputRefused
from exporter.graph.weights import Quantized, Weight
from exporter.merging.threads import single_threaded, thread_pool
from exporter.parity.bundles import Bundle
from exporter.parity.elements import allowed_roundings, elements_pass, is_near, read_values, within_step
from exporter.parity.gates import ProjectionLimits
from exporter.parity.onto import onto_share
from exporter.parity.oracle import Oracle
from exporter.parity.projection import is_projected, judge_projection, project
from exporter.parity.result import GateResult, Outcome, Projection, number
from exporter.parity.untouched import untouched
from exporter.progress import SILENT, Progress, Task


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


def check_weights(
    bundle: Bundle, oracle: Oracle, limits: ProjectionLimits, progress: Progress = SILENT
) -> WeightChecks:
    """Every weight gate of one bundle."""
    weights = canonical_weights(bundle, oracle)
    with progress.task("check the weights", len(oracle.expected_names | set(oracle.names)), "tensors") as task:
        return _checked(bundle, weights, oracle, limits, task)


def canonical_weights(bundle: Bundle, oracle: Oracle) -> dict[str, Weight]:
    return {oracle.canonical(name): weight for name, weight in bundle.weights.items()}


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


def _reported(projection: Projection) -> Projection:
    """Without what is not finite, which JSON cannot hold."""
    figures = {key: getattr(projection, key) for key in ("share", "error", "rounding")}
    return replace(projection, **{key: value if value is None else number(value) for key, value in figures.items()})


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


def _onto_gate(weights: Mapping[str, Weight], oracle: Oracle, limits: ProjectionLimits) -> GateResult | None:
    found = onto_share(weights, oracle)
    if found is None:
        return None
    outcome, limit = found.judge(limits), max(limits.share, limits.errors * found.error)
    detail = f"share of the base's own weights {found.share:.4f} with se {found.error:.2g}"
    if outcome == "FAIL":
        detail = f"the merge does not stand on the base's int8 codes: {detail}"
    return _result("weights.onto", outcome, abs(found.share), limit, found.tensors, detail)


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
