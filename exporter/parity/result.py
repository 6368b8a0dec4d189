"""What `verify` found, as frozen types: the JSON document, its schema and every report are made from these.

Numbers that do not exist (no finite bound, nothing scored) are None: JSON has no infinity.
"""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

SCHEMA_VERSION = 1

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]
Outcome = Literal["PASS", "FAIL", "INCONCLUSIVE", "RECORDED"]
EXIT_CODES: dict[Verdict, int] = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}


@dataclass(frozen=True, slots=True)
class GateResult:
    """One figure against one limit. `gate` is the threshold's id; RECORDED figures are not gated."""

    gate: str
    pair: str
    statistic: str
    scope: str
    outcome: Outcome
    kind: Literal["correctness", "quality"]
    estimate: float | None
    lower: float | None
    upper: float | None
    limit: float | None
    bound: Literal["upper", "lower", "exact", "none"]
    tokens: int
    documents: int
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Mutant:
    """A deliberate error. `killed_by` names the gates that saw it; a survivor makes the run invalid."""

    name: str
    stage: Literal["merge", "graph", "logits"]
    outcome: Literal["killed", "survived", "not applicable"]
    expected: tuple[str, ...]
    killed_by: tuple[str, ...]
    detail: str


@dataclass(frozen=True, slots=True)
class Projection:
    """How much of the adapter's change stands in one weight of the bundle: `share` should be 1, `error` is its se."""

    tensor: str
    share: float | None
    error: float | None
    relative_delta: float  # ||delta|| / ||W||
    rounding: float | None  # ||W_bundle - W - delta|| / ||delta||


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the ladder. `share` is its part of the chain's error variance; the shares of a chain sum to 1."""

    chain: str
    step: str
    share: float | None
    kl: float | None


@dataclass(frozen=True, slots=True)
class PositionKL:
    """Mean KL of the scored tokens at positions start..stop-1."""

    start: int
    stop: int
    kl: float
    tokens: int


@dataclass(frozen=True, slots=True)
class WorstToken:
    """A scored token with the largest KL, its context, and each side's best token."""

    document: int
    position: int
    kl: float
    context: str
    token: str
    reference_top: str
    candidate_top: str


@dataclass(frozen=True, slots=True)
class CacheCheck:
    """One way of feeding the same tokens against a single prefill: centered max error in logits, and KL."""

    name: str
    positions: int
    centered_max: float
    kl: float


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of tokens by log10 of KL; `edges` has one more entry than `counts`, and its ends take what is beyond."""

    pair: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BundleResult:
    """Everything about one bundle."""

    directory: str
    format: str
    target: str
    provenance: str
    files: dict[str, str]
    verdict: Verdict
    correctness: Verdict
    quality: Verdict | None
    gates: tuple[GateResult, ...]
    projections: tuple[Projection, ...]
    stages: tuple[Stage, ...]
    mutants: tuple[Mutant, ...]
    cache: tuple[CacheCheck, ...]
    histograms: tuple[Histogram, ...]
    by_position: tuple[PositionKL, ...]
    worst: tuple[WorstToken, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What was compared, on which texts."""

    base: str
    base_files: dict[str, str]
    adapters: tuple[str, ...]
    adapter_files: dict[str, str]
    reference: str
    reference_environment: dict[str, str]
    level: str
    documents: int
    prompt_tokens: int
    response_tokens: int
    text_tokens: int
    truncated: int
    tokens_sha256: str
    thresholds_version: int
    seconds: float
    onto: str = "original"  # what was merged onto, in the truth and in the bundles: "original" or "int8"


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of `exporter verify`: a verdict, its exit code and the evidence."""

    schema_version: int
    verdict: Verdict
    summary: str
    inputs: Inputs
    environment: dict[str, str]
    bundles: tuple[BundleResult, ...]
    notes: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0 passed, 1 failed, 3 not enough evidence."""
        return EXIT_CODES[self.verdict]

    def to_json(self) -> str:
        """One JSON document that follows report/verification.schema.json; no NaN or infinity in it."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def number(value: float) -> float | None:
    """`value` for a JSON document: None where it is not finite."""
    return float(value) if math.isfinite(value) else None


def worst_verdict(verdicts: list[Verdict]) -> Verdict:
    """FAIL over INCONCLUSIVE over PASS."""
    for verdict in ("FAIL", "INCONCLUSIVE"):
        if verdict in verdicts:
            return verdict
    return "PASS"
