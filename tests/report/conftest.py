"""One verification that failed and one that passed, without any model: reports are made from values alone."""

import math
from dataclasses import replace

import pytest

from exporter.parity.result import (
    SCHEMA_VERSION,
    BundleResult,
    CacheCheck,
    CodesError,
    GateResult,
    Histogram,
    Inputs,
    Layer,
    MergeBase,
    MergeBases,
    Mutant,
    Origin,
    PositionKL,
    Projection,
    Stage,
    Verification,
    WorstToken,
)

HOSTILE = "<script>alert('x')</script> & \x07 | ünïcode 🙂 \n\t"


MEANS = {"T-O": 3e-7, "R-O": 2.6e-4, "T-R": 2.5e-4}
EDGES = tuple(round(-9 + 0.25 * i, 2) for i in range(45))


def histogram(pair: str) -> Histogram:
    """Tokens around the pair's mean, as a bell in log10 KL."""
    middle = math.log10(MEANS[pair]) - 0.7
    counts = (round(300 * math.exp(-((edge + 0.125 - middle) ** 2))) for edge in EDGES[:-1])
    return Histogram(pair, EDGES, tuple(counts))


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
        *(gate("recorded", pair, "kl_mean", "RECORDED", mean, None) for pair, mean in MEANS.items()),
        gate("recorded", "T-O", "top1", "RECORDED", 0.9987, None),
        gate("rounding.kl", "M32-F", "kl_mean", "PASS", 4e-9, 1e-4),
        gate("cache.max", "O-D", "centered_max", "PASS", 3e-5, 2e-3),
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
        cache=(
            CacheCheck("decode, past 1", 8, 1e-6, 1e-13),
            CacheCheck("decode, past 511", 8, 3e-5, 1e-12),
            CacheCheck("right-padded batch, other pad token", 20, 0.0, 0.0),
        ),
        histograms=tuple(map(histogram, MEANS)),
        by_position=tuple(PositionKL(20 * i, 20 * i + 20, 2e-7 * (1 + (i * 7) % 5), 150) for i in range(16)),
        worst=tuple(WorstToken(i, 7 + i, 0.1 / (i + 1), HOSTILE, " token", "\n", "b") for i in range(20)),
        notes=("a note",) if bad else (),
        layers=tuple(
            Layer(part, i * 1e-9 * (1e4 if bad and part == "block 3" else 1), 1e-8 * (i + 1), 0.1, None if i else 0.0)
            for i, part in enumerate(["embeddings", *(f"block {i}" for i in range(8)), "head"])
        ),
        origin=Origin("merge", ("block 3",), ("h.3.attn.c_attn.weight",), "share 0.5 of the change") if bad else None,
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
        merge_bases=MergeBases(
            (
                MergeBase("original", 9e-4, 8e-4, 1e-3, 2e-12, 1e-12, 3e-12),
                MergeBase("int8", 6e-4, 5e-4, 7e-4, 9e-4, 8e-4, 1e-3),
            ),
            tuple(CodesError(f"h.{i}.attn.c_attn.weight", 0.6 + 0.05 * i, 0.009) for i in range(8)),
            (Stage("T to R", "T -> D", 0.7, 6e-4), Stage("T to R", "D -> R", 0.3, 3e-4)),
        ),
    )


def nothing_to_draw() -> Verification:
    """A bundle of which nothing could be drawn: no share, no position, no gate but one."""
    passing = verification("PASS")
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


VERIFICATIONS = {
    "failing": lambda: verification("FAIL"),
    "passing": lambda: verification("PASS"),
    "unsure": lambda: verification("INCONCLUSIVE"),
    "empty": nothing_to_draw,
}


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
def empty() -> Verification:
    return nothing_to_draw()
