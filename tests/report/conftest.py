"""One verification that failed and one that passed, without any model: reports are made from values alone."""

from dataclasses import replace

import pytest

from exporter.parity.result import (
    SCHEMA_VERSION,
    BundleResult,
    CacheCheck,
    GateResult,
    Histogram,
    Inputs,
    Mutant,
    PositionKL,
    Projection,
    Stage,
    Verification,
    WorstToken,
)

HOSTILE = "<script>alert('x')</script> & \x07 | ünïcode 🙂 \n\t"


def gate(name: str, pair: str, statistic: str, outcome: str, estimate: float | None, limit: float | None) -> GateResult:
    return GateResult(
        gate=name,
        pair=pair,
        statistic=statistic,
        scope="response",
        outcome=outcome,  # type: ignore[arg-type]
        kind="correctness",
        estimate=estimate,
        lower=estimate,
        upper=estimate,
        limit=limit,
        bound="none" if outcome == "RECORDED" else "upper",
        tokens=1283,
        documents=32,
        detail="a detail",
    )


def bundle(verdict: str) -> BundleResult:
    bad = verdict == "FAIL"
    gates = (
        gate("weights.projection", "T-W", "projection", verdict, 0.5 if bad else 1e-4, 0.02),
        gate("graph.kl", "F-O", "kl_mean", "PASS", 1e-6, 1e-3),
        gate("quality.top1", "T-F", "top1", "RECORDED", None, 0.96),
        gate("recorded", "R-O", "kl_mean", "RECORDED", 2.6e-4, None),
        gate("finite", "F-O", "not_finite", "PASS", 0.0, 0.0),
    )
    shares = (0.5 if bad else 1.0, 0.0001)
    return BundleResult(
        directory="artifacts/demo/merged",
        format="float",
        target="cpu",
        provenance="known",
        files={"model.onnx": "0" * 64, "model.safetensors": "1" * 64},
        verdict=verdict,  # type: ignore[arg-type]
        correctness=verdict,  # type: ignore[arg-type]
        quality=None,
        gates=gates,
        projections=tuple(
            Projection(f"h.{i}.attn.c_attn.weight", shares[0] if i == 3 else 1.0, shares[1], 0.01, 0.02)
            for i in range(8)
        ),
        stages=(
            Stage("T to O", "T -> M32", -0.01, 1e-12),
            Stage("T to O", "M32 -> F", 0.96, 1e-8),
            Stage("T to O", "F -> O", 0.05, None),
        ),
        mutants=(
            Mutant("adapter dropped", "merge", "killed", ("weights.projection",), ("weights.projection",), "in each"),
            Mutant("positions + 1", "graph", "survived" if bad else "killed", ("graph.max",), (), "centered max 1e-6"),
            Mutant("transposed", "merge", "not applicable", ("weights.projection",), (), "not square"),
        ),
        cache=(CacheCheck("decode, past 1", 8, 1e-6, 1e-13), CacheCheck("right-padded batch", 20, 0.0, 0.0)),
        histograms=tuple(Histogram(pair, (-9.0, -6.0, -3.0, 0.0), (10, 200, 3)) for pair in ("T-O", "R-O", "T-R")),
        by_position=(PositionKL(1, 20, 1e-6, 50), PositionKL(20, 90, 2e-6, 50)),
        worst=tuple(WorstToken(i, 7 + i, 0.1 / (i + 1), HOSTILE, " token", "\n", "b") for i in range(20)),
        notes=("a note",) if bad else (),
    )


def verification(verdict: str) -> Verification:
    inputs = Inputs(
        base="demo/base",
        base_files={"model.safetensors": "2" * 64},
        adapters=("demo/adapter x 1",),
        adapter_files={"0/adapter_model.safetensors": "3" * 64},
        reference="int8",
        reference_environment={"device": "cpu AVX512"},
        level="commit",
        documents=32,
        prompt_tokens=1080,
        response_tokens=1283,
        text_tokens=0,
        truncated=2,
        tokens_sha256="4" * 64,
        thresholds_version=1,
        seconds=81.5,
    )
    return Verification(
        schema_version=SCHEMA_VERSION,
        verdict=verdict,  # type: ignore[arg-type]
        summary="a line",
        inputs=inputs,
        environment={"torch": "2.13.0"},
        bundles=(
            bundle(verdict),
            replace(bundle("PASS"), directory="artifacts/demo/int8", format="int8", quality="PASS"),
        ),
        notes=("2 of 32 documents were cut",),
    )


@pytest.fixture
def failing() -> Verification:
    return verification("FAIL")


@pytest.fixture
def passing() -> Verification:
    return verification("PASS")


@pytest.fixture
def unsure() -> Verification:
    return verification("INCONCLUSIVE")


@pytest.fixture
def empty(passing: Verification) -> Verification:
    """A bundle of which nothing could be drawn: no share, no position, no gate but one."""
    bare = replace(
        passing.bundles[0],
        gates=(gate("finite", "F-O", "not_finite", "FAIL", None, 0.0),),
        projections=(Projection("w", None, None, 0.0, None),),
        stages=(Stage("T to O", "T -> M32", None, None),),
        mutants=(),
        cache=(),
        histograms=(),
        by_position=(),
        worst=(),
    )
    return replace(passing, bundles=(bare,))
