"""Gates: three outcomes, evidence, scopes, and the frozen numbers."""

from dataclasses import replace

import numpy as np
import pytest

from exporter.parity.gates import Comparison, Gate, finiteness, judge, load_thresholds, measure, verdict
from exporter.parity.statistics import PairTokens

GATE = Gate("g", "A-B", "kl_mean", ("float",), "upper", 0.01, ("response",), "correctness", True, 100, 8)


def tokens(kl: np.ndarray) -> PairTokens:
    nothing, yes = np.zeros(len(kl)), np.ones(len(kl), bool)
    return PairTokens(
        kl=kl,
        same_top=yes,
        clear=yes,
        delta_p=nothing,
        nll_ref=nothing,
        nll_cand=nothing,
        centered_max=nothing,
        error_energy=nothing,
        ref_energy=np.ones(len(kl)),
        finite=yes,
    )


def comparison(kl: np.ndarray, documents: int = 20, scope: str = "response") -> Comparison:
    document = np.arange(len(kl)) * documents // len(kl)
    return Comparison("A-B", tokens(kl), document, np.full(len(kl), scope))


def noisy(mean: float, seed: int = 0) -> np.ndarray:
    """400 values whose mean is exactly `mean`."""
    values = np.random.default_rng(seed).uniform(0.5, 1.5, 400)
    return mean * values / values.mean()


@pytest.mark.parametrize(("mean", "outcome"), [(0.005, "PASS"), (0.02, "FAIL"), (0.01, "INCONCLUSIVE")])
def test_pass_fail_and_neither(mean: float, outcome: str) -> None:
    (result,) = judge(GATE, comparison(noisy(mean)))
    assert result.outcome == outcome
    assert result.lower is not None
    assert result.upper is not None
    assert result.lower < result.estimate < result.upper  # type: ignore[operator]


def test_too_little_evidence_is_inconclusive_where_required_and_recorded_elsewhere() -> None:
    (few,) = judge(GATE, comparison(noisy(0.005)[:50]))
    assert few.outcome == "INCONCLUSIVE"
    (recorded,) = judge(replace(GATE, required=False), comparison(noisy(0.005)[:50]))
    assert recorded.outcome == "RECORDED"
    (alone,) = judge(GATE, comparison(noisy(0.005), documents=3))
    assert alone.outcome == "INCONCLUSIVE"
    assert "3 documents" in alone.detail


def test_scopes_are_gated_apart() -> None:
    kl = np.concatenate([noisy(0.005), noisy(0.05, 1)])
    both = Comparison("A-B", tokens(kl), np.tile(np.arange(20), 40), np.repeat(["prompt", "response"], 400))
    outcomes = {r.scope: r.outcome for r in judge(replace(GATE, scopes=("prompt", "response", "text")), both)}
    assert outcomes == {"prompt": "PASS", "response": "FAIL"}


def test_one_logit_that_is_not_finite_fails_every_gate_of_the_pair() -> None:
    broken = comparison(noisy(0.005))
    finite = broken.tokens.finite.copy()
    finite[7] = False
    broken = replace(broken, tokens=replace(broken.tokens, finite=finite))
    assert finiteness(broken).outcome == "FAIL"
    assert judge(GATE, broken)[0].outcome == "FAIL"
    assert finiteness(comparison(noisy(0.005))).outcome == "PASS"


def test_an_exact_gate_fails_on_nan() -> None:
    gate = replace(GATE, statistic="centered_max", bound="exact", tokens=1, documents=1)
    broken = comparison(noisy(0.005))
    broken = replace(broken, tokens=replace(broken.tokens, centered_max=np.full(400, np.nan)))
    assert judge(gate, broken)[0].outcome == "FAIL"


def test_the_excess_over_the_reference_is_the_formula() -> None:
    kl, other = noisy(0.004), noisy(0.012, 1)
    both = replace(comparison(kl), other_kl=other)
    bounds = measure("excess_kl", both, np.ones(400, bool), allowance=2e-3)
    assert bounds.estimate == pytest.approx(kl.mean() - other.mean() - max(2e-3, other.mean() / 4), rel=1e-12)
    small = measure("excess_kl", replace(both, other_kl=other / 100), np.ones(400, bool), allowance=2e-3)
    assert small.estimate == pytest.approx(kl.mean() - other.mean() / 100 - 2e-3, rel=1e-12)


def test_a_gain_of_nothing_is_no_gain() -> None:
    gate = replace(GATE, statistic="gain_kl", bound="lower", limit=0.0)
    kl = noisy(0.01)
    assert judge(gate, replace(comparison(kl), other_kl=kl))[0].outcome == "FAIL"
    assert judge(gate, replace(comparison(kl), other_kl=2 * kl))[0].outcome == "PASS"
    assert judge(gate, replace(comparison(kl), other_kl=kl / 2))[0].outcome == "FAIL"


def test_the_verdict_is_the_worst_outcome_of_its_kind() -> None:
    good, bad, unsure = (judge(GATE, comparison(noisy(mean)))[0] for mean in (0.005, 0.02, 0.01))
    assert verdict([good], "correctness") == "PASS"
    assert verdict([good, unsure], "correctness") == "INCONCLUSIVE"
    assert verdict([good, unsure, bad], "correctness") == "FAIL"
    assert verdict([good, replace(bad, kind="quality")], "correctness") == "PASS"
    assert verdict([good, replace(bad, outcome="RECORDED")], "correctness") == "PASS"


def test_the_frozen_numbers() -> None:
    """Loosening one of these needs figures before and after; this test is the reminder."""
    thresholds = load_thresholds()
    limits = {(g.id, f): g.limit for g in thresholds.gates for f in g.formats}
    assert thresholds.version == 1
    assert limits["peft-merge.max", "float"] == 1e-3
    assert limits["peft-merge.nmse", "float"] == 1e-8
    assert limits["rounding.kl", "float"] == 1e-4
    assert limits["graph.max", "int4"] == 1e-3
    assert limits["graph.kl", "float"] == 1e-3
    assert limits["graph.kl", "int8"] == 2e-3
    assert limits["quality.kl", "int8"] == 0.01
    assert limits["quality.kl", "int4"] == 0.05
    assert limits["reference.excess", "float"] == 0
    assert limits["cache.max", "float"] == 2e-3
    assert (thresholds.projection.share, thresholds.projection.errors, thresholds.projection.blind) == (0.02, 4, 0.25)
