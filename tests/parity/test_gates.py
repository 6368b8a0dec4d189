"""Gates: three outcomes, evidence, scopes, and the frozen numbers."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import rel_entr, softmax

from exporter.parity.evidence import apart
from exporter.parity.gates import Comparison, Gate, finiteness, judge, load_thresholds, measure, verdict
from exporter.parity.statistics import PairTokens, compare, score

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


def test_a_few_documents_that_all_speak_against_the_bundle_are_not_passed_over() -> None:
    gate = replace(GATE, scopes=("response", "text"))
    for mean, outcome in ((0.005, "RECORDED"), (5.0, "INCONCLUSIVE")):
        both = Comparison(
            "A-B",
            tokens(np.concatenate([noisy(0.005), noisy(mean)])),
            np.concatenate([np.arange(400) // 20, 20 + np.arange(400) // 80]),
            np.repeat(["response", "text"], 400),
        )
        response, text = judge(gate, both)
        assert (response.outcome, text.outcome, text.documents) == ("PASS", outcome, 5)


def test_a_required_gate_without_tokens_is_inconclusive() -> None:
    (nothing,) = judge(GATE, comparison(noisy(0.005), scope="text"))
    assert (nothing.outcome, nothing.tokens) == ("INCONCLUSIVE", 0)
    assert judge(replace(GATE, required=False), comparison(noisy(0.005), scope="text")) == []


def test_a_reference_that_is_the_model_itself_is_no_reference() -> None:
    rng = np.random.default_rng(4)
    rounding = 1e-14 * rng.uniform(-1, 1, 400)
    outcomes = [gate.outcome for gate in apart([comparison(rounding), comparison(noisy(1e-6))])]
    assert outcomes == ["FAIL", "PASS"]
    assert apart([comparison(np.full(400, np.nan))])[0].outcome == "FAIL"


def test_the_figures_are_llama_cpps() -> None:
    """llama.cpp, perplexity --kl-divergence: means over all tokens, whatever document they are of.

    mean KL; RMS delta-p = sqrt(mean(delta_p^2)); same top-p = share of equal best tokens; ln PPL ratio =
    mean(nll) - mean(nll_base), PPL ratio its exponential; percentiles of KL.
    """
    rng = np.random.default_rng(8)
    logits = rng.normal(-60, 3, (500, 60))
    other = logits + rng.normal(0, 0.3, logits.shape)
    targets = rng.integers(0, 60, 500)
    pair = compare(score(logits, targets), score(other, targets), targets)
    document = np.sort(rng.integers(0, 17, 500))
    both = Comparison("A-B", pair, document, np.full(500, "response"))
    every, rows = np.ones(500, bool), np.arange(500)
    p, q = softmax(logits, axis=-1), softmax(other, axis=-1)
    kl = rel_entr(p, q).sum(axis=-1)
    nll, nll_base = -np.log(q[rows, targets]), -np.log(p[rows, targets])
    a, b = (x - x.mean(-1, keepdims=True) for x in (logits, other))
    expected = {
        "kl_mean": kl.mean(),
        "kl_median": np.median(kl),
        "kl_p99": np.percentile(kl, 99),
        "kl_p999": np.percentile(kl, 99.9),
        "kl_max": kl.max(),
        "top1": (p.argmax(-1) == q.argmax(-1)).mean(),
        "delta_p_rms": np.sqrt(((q - p)[rows, targets] ** 2).mean()),
        "ln_ppl_ratio": np.log(np.exp(nll.mean()) / np.exp(nll_base.mean())),
        "nmse": ((b - a) ** 2).sum() / (a**2).sum(),
        "centered_max": np.abs(b - a).max(),
    }
    for statistic, value in expected.items():
        assert measure(statistic, both, every).estimate == pytest.approx(value, rel=1e-9), statistic


def test_every_gate_of_the_packaged_set_can_be_reached() -> None:
    """A gate that needs more than the 120 packaged prompts has one beside it that they can meet."""
    gates = load_thresholds().gates
    beyond = {(gate.id, gate.formats) for gate in gates if gate.documents > 120}
    within = {(gate.id, gate.formats) for gate in gates if gate.documents <= 120}
    assert beyond
    assert {(f"{name}-few", formats) for name, formats in beyond} <= within


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
    assert thresholds.version == 3
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
    assert limits["rounding.top1-clear-few", "float"] == limits["graph.top1-few", "float"] == 0.97
    assert (limits["quality.top1-few", "int8"], limits["quality.top1-few", "int4"]) == (0.93, 0.8)
    assert (thresholds.projection.share, thresholds.projection.errors, thresholds.projection.blind) == (0.02, 4, 0.25)
