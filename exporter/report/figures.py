"""Numbers as a reader wants them, the same in every report."""

import re
from collections.abc import Sequence
from pathlib import Path

from exporter.parity.result import BundleResult, GateResult, Verification

NAMES = {
    "T": "fp32, unmerged (truth)",
    "R": "8-bit, unmerged (reference)",
    "B": "base alone",
    "M32": "PEFT's merge, fp32",
    "F": "bundle's weights, fp32",
    "O": "ONNX bundle",
    "O1": "ONNX, full-precision products",
    "C": "ONNX, full-precision products, where the context is full",
    "D": "ONNX, cached decoding; between T and R: fp32 over what the base's 8-bit codes mean",
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
    "cache_nmse": "normalized squared error of the cache's keys and values",
    "centered_max": "largest centered difference of a logit",
    "excess_kl": "KL beyond what the reference's own noise allows",
    "gain_kl": "KL that the adapter closes",
    "not_finite": "positions that are not finite",
    "elements": "tensors with a wrong element",
    "untouched": "tensors that should equal the base",
    "step": "tensors beyond one quantization step",
    "projection": "error of the adapter's share",
    "names": "missing or foreign tensors",
    "missing": "positions not compared",
    "equal": "equal logits where they must differ",
    "same": "a reference that is the model itself",
}

EXACT = ("finite", "evidence.count", "evidence.distinct", "evidence.apart")  # counted, not listed, where they passed
STEPS = {
    "T -> M32": "PEFT's merge",
    "M32 -> F": "the stored weights",
    "F -> O": "the graph",
    "T -> D": "8-bit weights",
    "D -> R": "8-bit activations",
}
ORIGINS = {
    "merge": "the merge",
    "rounding": "storing the weights in their type",
    "quantization": "the quantization",
    "graph": "the graph",
}
MAIN = ("weights.projection", "graph.max", "graph.kl", "quality.kl", "reference.excess", "cache.kl", "liveness.gain")


def figure(value: float | None) -> str:
    """Three significant digits; a dash where there is no number."""
    if value is None:
        return "–"
    return re.sub(r"e\+?(-?)0*", r"e\1", f"{value:.3g}")


def source_name(source: str) -> str:
    """The last part of a path; for a directory in the hub's cache, owner/name. A weight behind it stays."""
    path, x, weight = source.partition(" x ")
    hub = next((part for part in Path(path).parts if part.startswith("models--")), None)
    return (hub.removeprefix("models--").replace("--", "/") if hub else Path(path).name or path) + x + weight


def bundle_names(bundles: Sequence[BundleResult]) -> list[str]:
    """A name for each bundle, as short as tells them apart: the end of its path, its format and target."""
    deepest = max((len(Path(bundle.directory).parts) for bundle in bundles), default=0)
    names: list[str] = []
    for depth in range(1, deepest + 1):
        names = [
            f"{'/'.join(Path(bundle.directory).parts[-depth:])} ({bundle.format}, {bundle.target})"
            for bundle in bundles
        ]
        if len(set(names)) == len(names):
            return names
    return [f"{name} #{i}" for i, name in enumerate(names, start=1)]


def recorded(bundle: BundleResult, pair: str, statistic: str) -> float | None:
    """A figure over all tokens that no gate judges; None where it was not measured."""
    found = (g for g in bundle.gates if g.gate == "recorded" and g.pair == pair and g.statistic == statistic)
    return next((gate.estimate for gate in found), None)


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


def deciding_bound(gate: GateResult) -> float | None:
    """The number that is held against the limit: a bound of the interval, or the figure itself."""
    return {"upper": gate.upper, "lower": gate.lower}.get(gate.bound, gate.estimate)


def used(gate: GateResult) -> float | None:
    """How much of its limit a gate uses: 1 is at the limit, above 1 is beyond. None where the limit is 0.

    A rate that must stay above a limit uses up the room below 1.
    """
    value, limit = deciding_bound(gate), gate.limit
    if value is None or not limit:
        return None
    return (1 - value) / (1 - limit) if gate.bound == "lower" and limit < 1 else max(value, 0.0) / limit


def beyond(gate: GateResult) -> str:
    """By how much a figure misses or keeps its limit."""
    if gate.limit is None or gate.estimate is None:
        return ""
    if gate.bound == "lower":
        gap = gate.limit - gate.estimate
        return f"{figure(abs(gap))} {'below' if gap > 0 else 'above'} the limit"
    if gate.limit == 0:
        return f"{figure(gate.estimate)} against 0"
    ratio = gate.estimate / gate.limit
    return f"{ratio:.0f} x the limit" if ratio >= 10 else f"{ratio:.2g} x the limit"


def nearest(bundle: BundleResult) -> str:
    """The passed gate that came closest to its limit, as a sentence."""
    known = [(used(gate), gate) for gate in judged(bundle) if gate.outcome == "PASS"]
    ratios = [(ratio, gate) for ratio, gate in known if ratio is not None]
    if not ratios:
        return ""
    ratio, gate = max(ratios, key=lambda entry: entry[0])
    return f"The gate nearest to its limit is {gate.gate} ({gate.pair}, {gate.scope}): it uses {percent(ratio)} of it."


def percent(ratio: float) -> str:
    """A share in percent, two digits, without an exponent."""
    value = 100 * ratio
    return f"{value:.0f} %" if value >= 10 else f"{value:.2g} %" if value >= 0.01 else "< 0.01 %"


def killed(bundle: BundleResult) -> tuple[int, int]:
    """(mutants killed, mutants that applied)."""
    applied = [mutant for mutant in bundle.mutants if mutant.outcome != "not applicable"]
    return sum(mutant.outcome == "killed" for mutant in applied), len(applied)


def answer(verification: Verification) -> str:
    """The verdict as a sentence."""
    bundles = verification.bundles
    faulty = sum(bundle.verdict == "FAIL" for bundle in bundles)
    unsure = sum(bundle.verdict == "INCONCLUSIVE" for bundle in bundles)
    what = "the merged, exported model" if len(bundles) == 1 else f"each of the {len(bundles)} bundles"
    if verification.verdict == "PASS":
        return f"Within the limits, {what} says what the unmerged 8-bit model says."
    of = "The bundle" if len(bundles) == 1 else f"{faulty or unsure} of {len(bundles)} bundles"
    one = (faulty or unsure) == 1
    if verification.verdict == "FAIL":
        return f"{of} {'does' if one else 'do'} not say what the unmerged 8-bit model says."
    return f"{of} could not be judged: the evidence is not enough for a verdict either way."


def where(bundle: BundleResult) -> list[str]:
    """Where an error comes from, as sentences: the stage, then the layers and tensors that are wrong."""
    found = []
    origin = bundle.origin
    if origin is not None:
        found.append(f"The error arises in {ORIGINS[origin.stage]}{': ' if origin.detail else '.'}{origin.detail}")
        if origin.parts:
            found.append(f"It stands in {listed(origin.parts)}.")
        if origin.tensors:
            found.append(f"Tensors: {listed(origin.tensors)}.")
    found.append(f"{largest_stage(bundle)}.")
    weak = [tensor for tensor in weak_tensors(bundle) if origin is None or tensor not in origin.tensors]
    if weak:
        found.append(f"The adapter does not stand once in {listed(weak)}.")
    return found


def listed(names: Sequence[str], most: int = 8) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def largest_stage(bundle: BundleResult) -> str:
    """The stage with the largest share of the error, in words. The first chain is the one from truth to bundle."""
    known = [stage for stage in bundle.stages if stage.share is not None and stage.chain == bundle.stages[0].chain]
    if not known:
        return "There is no error to attribute"
    stage = max(known, key=lambda one: one.share or 0)
    return f"{100 * (stage.share or 0):.0f} % of the error from truth to bundle comes from {stage_name(stage.step)}"


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
