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
class Layer:
    """One part of the model, in the order in which it runs. What was not measured is None.

    local: the truth's input given to this part alone, squared error over the square of what the part adds.
    accumulated: the bundle's weights from the first part to here, squared error over the square of the truth's state.
    swap: the share of KL(T||F) that goes away when this part alone is the truth's; negative where the part's error
    cancels another's. graph: as `local`, of the graph against the model with the same weights, on the graph's input.
    """

    part: str  # "embeddings", "block 0", ..., "head"
    local: float | None
    accumulated: float | None
    swap: float | None
    graph: float | None


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a bundle's error comes from: the stage, and the parts and tensors in which it stands, the worst first."""

    stage: Literal["merge", "rounding", "quantization", "graph"]
    parts: tuple[str, ...]
    tensors: tuple[str, ...]
    detail: str


@dataclass(frozen=True, slots=True)
class CodesError:
    """q = W - W_int8 of one adapted weight: ||q|| / ||delta||, and ||q|| / ||W||."""

    tensor: str
    to_delta: float | None
    to_weight: float


@dataclass(frozen=True, slots=True)
class MergeBase:
    """A merge onto the base's own weights ("original") or onto what its int8 codes mean ("int8").

    Mean KL over all tokens with its one-sided bounds: KL(R||M) to the 8-bit reference, KL(T||M) to the fp32 truth over
    the base's own weights.
    """

    onto: Literal["original", "int8"]
    to_reference: float | None
    to_reference_lower: float | None
    to_reference_upper: float | None
    to_truth: float | None
    to_truth_lower: float | None
    to_truth_upper: float | None


@dataclass(frozen=True, slots=True)
class MergeBases:
    """Which base to merge onto. bases is empty where the level was too small to score both."""

    bases: tuple[MergeBase, ...]
    tensors: tuple[CodesError, ...]
    stages: tuple[Stage, ...] = ()  # T -> D -> R: what 8 bits do to the weights, and then to the activations


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
    layers: tuple[Layer, ...] = ()
    origin: Origin | None = None  # None where nothing is wrong


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
    merge_bases: MergeBases | None = None

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
