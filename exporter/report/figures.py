"""Numbers as a reader wants them, the same in every report."""

from collections.abc import Sequence
from pathlib import Path

from exporter.parity.result import BundleResult, GateResult

NAMES = {
    "T": "fp32, unmerged (truth)",
    "R": "8-bit, unmerged (reference)",
    "B": "base alone",
    "M32": "PEFT's merge, fp32",
    "F": "bundle's weights, fp32",
    "O": "ONNX bundle",
    "O1": "ONNX, full-precision products",
    "D": "ONNX, cached decoding",
    "P": "ONNX, padded batch",
    "W": "bundle's weights",
}
STATISTICS = {
    "kl_mean": "mean KL",
    "kl_median": "median KL",
    "kl_p99": "KL, 99th percentile",
    "kl_p999": "KL, 99.9th percentile",
    "kl_max": "largest KL",
    "top1": "same top token",
    "top1_clear": "same top token where the lead is clear",
    "delta_p_rms": "RMS change of the true token's probability",
    "ln_ppl_ratio": "ln of the perplexity ratio",
    "nmse": "normalized squared error",
    "centered_max": "largest centered difference of a logit",
    "excess_kl": "KL beyond what the reference's own noise allows",
    "gain_kl": "KL that the adapter closes",
    "not_finite": "positions that are not finite",
    "elements": "tensors with a wrong element",
    "untouched": "tensors that should equal the base",
    "step": "tensors beyond one quantization step",
    "projection": "distance of the adapter's share from 1",
    "names": "missing or foreign tensors",
    "missing": "positions not compared",
    "equal": "equal logits where they must differ",
}

STEPS = {"T -> M32": "merging", "M32 -> F": "storing the weights", "F -> O": "the graph"}
MAIN = ("weights.projection", "graph.max", "graph.kl", "quality.kl", "reference.excess", "cache.kl", "liveness.gain")


def figure(value: float | None) -> str:
    """Three significant digits; a dash where there is no number."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 else f"{value:.2e}".replace("e-0", "e-").replace("e+0", "e")


def bundle_name(bundle: BundleResult) -> str:
    return f"{Path(bundle.directory).name} ({bundle.format}, {bundle.target})"


def statistic_name(name: str) -> str:
    return STATISTICS.get(name, name.replace("_", " "))


def pair_title(pair: str) -> str:
    """The two models of a pair in words."""
    return " against ".join(NAMES.get(letter, letter) for letter in pair.split("-"))


def judged(bundle: BundleResult) -> list[GateResult]:
    """The gates that had a say, the worst outcomes first."""
    order = {"FAIL": 0, "INCONCLUSIVE": 1, "PASS": 2}
    return sorted((gate for gate in bundle.gates if gate.outcome in order), key=lambda gate: order[gate.outcome])


def telling(bundle: BundleResult) -> list[GateResult]:
    """What a short summary shows: faults, else the gates on logits and on the adapter's projection."""
    faults = [gate for gate in judged(bundle) if gate.outcome != "PASS"]
    return faults or [gate for gate in judged(bundle) if gate.gate in MAIN and gate.scope != "prompt"]


def beyond(gate: GateResult) -> str:
    """By how much a figure misses or keeps its limit."""
    if gate.limit is None or gate.estimate is None:
        return ""
    if gate.limit == 0:
        return f"{figure(gate.estimate)} against 0"
    return f"{gate.estimate / gate.limit:.2g} x the limit"


def nearest(bundle: BundleResult) -> str:
    """The passed gate that came closest to its limit, as a sentence."""
    ratios = []
    for gate in judged(bundle):
        value = gate.estimate if gate.bound == "exact" else gate.upper if gate.bound == "upper" else None
        if gate.outcome == "PASS" and value is not None and gate.limit:
            ratios.append((value / gate.limit, gate))
    if not ratios:
        return ""
    ratio, gate = max(ratios, key=lambda entry: entry[0])
    return f"The gate nearest to its limit is {gate.gate} ({gate.pair}, {gate.scope}), at {100 * ratio:.2g} % of it."


def killed(bundle: BundleResult) -> tuple[int, int]:
    """(mutants killed, mutants that applied)."""
    applied = [mutant for mutant in bundle.mutants if mutant.outcome != "not applicable"]
    return sum(mutant.outcome == "killed" for mutant in applied), len(applied)


def largest_stage(bundle: BundleResult) -> str:
    """The stage with the largest share of the error, in words."""
    known = [stage for stage in bundle.stages if stage.share is not None]
    if not known:
        return "no error to attribute"
    stage = max(known, key=lambda one: one.share or 0)
    return f"{stage_name(stage.step)} carries {100 * (stage.share or 0):.0f} % of the error"


def stage_name(step: str) -> str:
    """A step of the ladder in words."""
    return f"{STEPS[step]} ({step})" if step in STEPS else step


def weak_tensors(bundle: BundleResult) -> Sequence[str]:
    """Tensors in which the adapter does not stand once: where a weight fault is."""
    known = [(p.tensor, p.share, p.error) for p in bundle.projections]
    return [
        tensor
        for tensor, share, error in known
        if share is None or error is None or abs(share - 1) > max(0.02, 4 * error)
    ]
