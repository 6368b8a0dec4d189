"""Gates: a statistic of a pair of models, a limit, and the evidence it takes. The numbers stand in thresholds.toml."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from exporter.parity import intervals
from exporter.parity.intervals import Bounds
from exporter.parity.result import GateResult, Outcome, Verdict, number
from exporter.parity.statistics import PairTokens

THRESHOLDS = Path(__file__).with_name("thresholds.toml")

Scope = Literal["prompt", "response", "text", "all"]


@dataclass(frozen=True, slots=True)
class Gate:
    """One entry of thresholds.toml."""

    id: str
    pair: str
    statistic: str
    formats: tuple[str, ...]
    bound: Literal["upper", "lower", "exact"]
    limit: float
    scopes: tuple[Scope, ...]
    kind: Literal["correctness", "quality"]
    required: bool
    tokens: int = 1
    documents: int = 1
    targets: tuple[str, ...] = ("cpu", "cuda")
    allowance: float = 0.0


@dataclass(frozen=True, slots=True)
class ProjectionLimits:
    """|share - 1| <= max(share, errors * se); nothing can be said where errors * se > blind."""

    share: float
    errors: float
    blind: float


@dataclass(frozen=True, slots=True)
class Thresholds:
    version: int
    gates: tuple[Gate, ...]
    projection: ProjectionLimits


@dataclass(frozen=True, slots=True)
class Comparison:
    """A pair's tokens with the document and scope of each, and, where a gate needs it, a second pair's KL beside it."""

    pair: str
    tokens: PairTokens
    document: NDArray[np.int64]  # (N,)
    scope: NDArray[np.str_]  # (N,)
    other_kl: NDArray[np.float64] | None = None  # (N,) KL(R||T) for excess_kl, KL(T||B) for gain_kl


def load_thresholds(path: Path = THRESHOLDS) -> Thresholds:
    """The versioned limits. A malformed file is a programming error and raises as such."""
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    return Thresholds(data["version"], tuple(map(_gate, data["gate"])), ProjectionLimits(**data["projection"]))


def _gate(entry: dict[str, Any]) -> Gate:
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    return Gate(**fields)


def judge(gate: Gate, comparison: Comparison) -> list[GateResult]:
    """One result per scope of the gate that holds any token. A required gate that finds none is INCONCLUSIVE."""
    results = []
    for scope in gate.scopes:
        rows = np.ones(len(comparison.scope), bool) if scope == "all" else comparison.scope == scope
        if rows.any():
            results.append(_judge_scope(gate, comparison, scope, rows))
    return results or ([_unjudged(gate)] if gate.required else [])


def _unjudged(gate: Gate) -> GateResult:
    """No token of any of the gate's scopes: nothing was measured, so nothing may pass."""
    return GateResult(
        gate=gate.id,
        pair=gate.pair,
        statistic=gate.statistic,
        scope=" or ".join(gate.scopes),
        outcome="INCONCLUSIVE",
        kind=gate.kind,
        estimate=None,
        lower=None,
        upper=None,
        limit=gate.limit,
        bound=gate.bound,
        tokens=0,
        documents=0,
        detail=f"no such tokens; the gate needs {gate.tokens} of {gate.documents} documents",
    )


def finiteness(comparison: Comparison) -> GateResult:
    """Exact: one logit that is not finite fails the pair."""
    bad = int((~comparison.tokens.finite).sum())
    return GateResult(
        gate="finite",
        pair=comparison.pair,
        statistic="not_finite",
        scope="all",
        outcome="FAIL" if bad else "PASS",
        kind="correctness",
        estimate=float(bad),
        lower=None,
        upper=None,
        limit=0.0,
        bound="exact",
        tokens=len(comparison.document),
        documents=len(np.unique(comparison.document)),
        detail=f"{bad} positions hold NaN or infinity" if bad else "",
    )


def verdict(results: Sequence[GateResult], kind: str) -> Verdict:
    """The worst outcome of a kind; what is only recorded has no say."""
    outcomes = {result.outcome for result in results if result.kind == kind}
    if "FAIL" in outcomes:
        return "FAIL"
    return "INCONCLUSIVE" if "INCONCLUSIVE" in outcomes else "PASS"


def outcome_of(gate: Gate, bounds: Bounds) -> Outcome:
    """PASS if the one-sided bound is inside, FAIL if the interval is wholly outside, else INCONCLUSIVE."""
    if gate.bound == "exact":
        # Written so that NaN fails.
        return "PASS" if bounds.estimate <= gate.limit else "FAIL"
    if gate.bound == "upper":
        if bounds.upper <= gate.limit:
            return "PASS"
        return "FAIL" if bounds.lower > gate.limit else "INCONCLUSIVE"
    # A rate may touch its limit; a gain of exactly nothing is no gain.
    inside = bounds.lower > 0 if gate.limit == 0 else bounds.lower >= gate.limit
    if inside:
        return "PASS"
    outside = bounds.upper <= 0 if gate.limit == 0 else bounds.upper < gate.limit
    return "FAIL" if outside else "INCONCLUSIVE"


def measure(statistic: str, comparison: Comparison, rows: NDArray[np.bool_], allowance: float = 0.0) -> Bounds:
    """The statistic over the chosen tokens, with one-sided bounds over documents."""
    tokens, document = comparison.tokens, comparison.document[rows]

    def columns(*values: NDArray) -> NDArray[np.float64]:
        return per_document(document, [np.asarray(value, dtype=np.float64)[rows] for value in values])

    everything = np.ones(len(comparison.document))
    if statistic == "kl_mean":
        return intervals.studentized_bootstrap(columns(tokens.kl, everything), intervals.ratio)
    if statistic in ("kl_median", "kl_p99", "kl_p999"):
        quantile = {"kl_median": 0.5, "kl_p99": 0.99, "kl_p999": 0.999}[statistic]
        return intervals.percentile_bootstrap(tokens.kl[rows], document, quantile)
    if statistic == "top1":
        return intervals.rate_bounds(*columns(tokens.same_top, everything).T)
    if statistic == "top1_clear":
        hits, clear = columns(tokens.same_top & tokens.clear, tokens.clear).T
        return intervals.rate_bounds(hits[clear > 0], clear[clear > 0]) if clear.any() else _nothing()
    if statistic == "delta_p_rms":
        return intervals.studentized_bootstrap(columns(tokens.delta_p**2, everything), _root_mean)
    if statistic == "ln_ppl_ratio":
        return intervals.studentized_bootstrap(columns(tokens.nll_cand - tokens.nll_ref, everything), intervals.ratio)
    if statistic == "nmse":
        return intervals.studentized_bootstrap(columns(tokens.error_energy, tokens.ref_energy), _energy_ratio)
    if statistic in ("kl_max", "centered_max"):
        value = float((tokens.kl if statistic == "kl_max" else tokens.centered_max)[rows].max(initial=0.0))
        return Bounds(value, value, value)
    if comparison.other_kl is None:
        raise ValueError(f"{statistic} needs a second pair beside {comparison.pair}")
    if statistic == "excess_kl":
        limit = _Excess(allowance)
        return intervals.studentized_bootstrap(columns(tokens.kl, comparison.other_kl, everything), limit)
    if statistic == "gain_kl":
        return intervals.studentized_bootstrap(columns(comparison.other_kl - tokens.kl, everything), intervals.ratio)
    raise ValueError(f"unknown statistic {statistic!r}")


def _judge_scope(gate: Gate, comparison: Comparison, scope: str, rows: NDArray[np.bool_]) -> GateResult:
    tokens, documents = int(rows.sum()), len(np.unique(comparison.document[rows]))
    bounds = measure(gate.statistic, comparison, rows, gate.allowance)
    if gate.bound == "exact":
        bounds = Bounds(bounds.estimate, -np.inf, np.inf)  # nothing was sampled: an interval would mean nothing
    outcome, detail = outcome_of(gate, bounds), ""
    if tokens < gate.tokens or documents < gate.documents:
        # The response must carry a verdict (the text, where there is no response); another scope with a handful of
        # tokens, such as one text among instructions, is recorded, unless all that there is speaks against it.
        must = gate.required and (scope in ("response", "all") or not (comparison.scope == "response").any())
        outcome = "INCONCLUSIVE" if must or (gate.required and outcome == "FAIL") else "RECORDED"
        detail = f"{tokens} tokens of {documents} documents; the gate needs {gate.tokens} of {gate.documents}"
    if not comparison.tokens.finite[rows].all():
        outcome, detail = "FAIL", "logits that are not finite"
    return GateResult(
        gate=gate.id,
        pair=comparison.pair,
        statistic=gate.statistic,
        scope=scope,
        outcome=outcome,
        kind=gate.kind,
        estimate=number(bounds.estimate),
        lower=number(bounds.lower),
        upper=number(bounds.upper),
        limit=gate.limit,
        bound=gate.bound,
        tokens=tokens,
        documents=documents,
        detail=detail,
    )


@dataclass(frozen=True, slots=True)
class _Excess:
    """mean KL(R||O) - mean KL(R||T) - max(allowance, mean KL(R||T) / 4), of sums (..., 3)."""

    allowance: float

    def __call__(self, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        candidate, truth = sums[..., 0] / sums[..., 2], sums[..., 1] / sums[..., 2]
        return candidate - truth - np.maximum(self.allowance, truth / 4)


def _root_mean(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.sqrt(np.maximum(sums[..., 0] / sums[..., 1], 0.0))


def _energy_ratio(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    return sums[..., 0] / np.maximum(sums[..., 1], np.finfo(np.float64).tiny)


def per_document(document: NDArray[np.int64], values: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Sums by document, (D, K)."""
    _, index = np.unique(document, return_inverse=True)
    return np.stack([np.bincount(index, weights=value).astype(np.float64) for value in values], axis=1)


def _nothing() -> Bounds:
    return Bounds(float("nan"), -np.inf, np.inf)
