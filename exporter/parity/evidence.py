"""Exact checks that the comparison was one: different models, the same tokens, the counts that were meant."""

from collections.abc import Sequence

import numpy as np

from exporter.parity.gates import Comparison
from exporter.parity.result import GateResult
from exporter.parity.scoring import LogitStore

SAME = 1e-10  # nats


def distinct(store: LogitStore, pairs: Sequence[tuple[str, str]]) -> list[GateResult]:
    """Two models that must differ have different logits: a model compared with itself passes every other gate."""
    results = []
    for a, b in pairs:
        same = store.digest(a) == store.digest(b)
        detail = f"{a} and {b} have the same logits, bit for bit: one was compared with itself" if same else ""
        results.append(
            _exact("evidence.distinct", f"{a}-{b}", "equal", float(same), store.rows, len(store.documents), detail)
        )
    return results


def apart(comparisons: Sequence[Comparison]) -> list[GateResult]:
    """The 8-bit reference is no copy of the model it is compared with, as a capture of the bundle itself would be.

    The median KL of one model with itself is rounding, below 1e-12; 8 bits, and float16 alone, leave far more.
    """
    results = []
    for one in comparisons:
        median = float(np.median(one.tokens.kl))
        same = not median > SAME
        detail = f"the median KL is {median:.2g}: the reference is the same model" if same else ""
        documents = len(np.unique(one.document))
        results.append(_exact("evidence.apart", one.pair, "same", float(same), len(one.document), documents, detail))
    return results


def counted(pair: str, tokens: int, store: LogitStore) -> GateResult:
    """Every scored position of every document entered the statistics."""
    missing = store.rows - tokens
    detail = f"{tokens} of {store.rows} positions were compared" if missing else ""
    return _exact("evidence.count", pair, "missing", float(abs(missing)), tokens, len(store.documents), detail)


def _exact(
    gate: str, pair: str, statistic: str, estimate: float, tokens: int, documents: int, detail: str
) -> GateResult:
    return GateResult(
        gate=gate,
        pair=pair,
        statistic=statistic,
        scope="all",
        outcome="FAIL" if estimate else "PASS",
        kind="correctness",
        estimate=estimate,
        lower=None,
        upper=None,
        limit=0.0,
        bound="exact",
        tokens=tokens,
        documents=documents,
        detail=detail,
    )
