"""Per-token statistics of two models that scored the same tokens. NumPy only, float64 throughout.

The definitions follow llama.cpp's `perplexity --kl-divergence` (KL(ref||cand), same-top, delta-p, PPL ratio), computed
from unrounded logits, so that a KL is never negative beyond float64 rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
Bool = NDArray[np.bool_]
Int = NDArray[np.int64]

CLEAR_MARGIN = 0.1  # A lead of the best logit over the second that rounding alone should not overturn.


@dataclass(frozen=True, slots=True)
class PairTokens:
    """One row per scored token. `kl` in nats; `delta_p` is cand's minus ref's probability of the true token."""

    kl: Float  # (N,)
    same_top: Bool  # (N,)
    clear: Bool  # (N,) the reference's margin is over CLEAR_MARGIN
    delta_p: Float  # (N,)
    nll_ref: Float  # (N,) nats
    nll_cand: Float  # (N,) nats
    centered_max: Float  # (N,) max over the vocabulary of |centered difference|, in logits
    error_energy: Float  # (N,) sum over the vocabulary of the squared centered difference
    ref_energy: Float  # (N,) sum over the vocabulary of the squared centered reference
    finite: Bool  # (N,) every logit of both sides is finite


@dataclass(frozen=True, slots=True)
class Scored:
    """One model's view of the scored positions, computed once and used in every pair."""

    log_p: Float  # (N, V)
    p: Float  # (N, V)
    nll: Float  # (N,) of the true token
    top: Int  # (N,)
    margin: Float  # (N,) the best logit minus the second best
    energy: Float  # (N,) sum over the vocabulary of the squared centered logits
    finite: Bool  # (N,)


def log_softmax(logits: NDArray[np.floating]) -> Float:
    """Natural log probabilities over the last axis, (..., V)."""
    return _distribution(logits)[0]


def _distribution(logits: NDArray[np.floating]) -> tuple[Float, Float]:
    """(log p, p), (..., V) each, from one exponential an element: it is most of the work."""
    log_p = np.subtract(logits, logits.max(axis=-1, keepdims=True), dtype=np.float64)
    p = np.exp(log_p)
    total = p.sum(axis=-1, keepdims=True)
    p /= total
    log_p -= np.log(total)
    return log_p, p


def kl_divergence(log_p: Float, log_q: Float, p: Float | None = None) -> Float:
    """KL(p||q) in nats over the last axis of (N, V). The difference is taken first: two close sums would cancel."""
    return np.einsum("nv,nv->n", np.exp(log_p) if p is None else p, log_p - log_q)


def score(logits: NDArray[np.floating], targets: Int) -> Scored:
    """`logits` (N, V) at the positions that predict `targets` (N,). Non-finite rows are marked, not dropped."""
    finite: Bool = np.asarray(np.isfinite(logits).all(axis=-1))
    if not finite.all():
        # The figures of such a row mean nothing, but one NaN must not make every sum NaN.
        logits = np.where(finite[:, None], logits, 0.0)
    rows = np.arange(len(targets))
    top = logits.argmax(axis=-1)
    best = logits[rows, top].astype(np.float64)
    others = np.array(logits)
    others[rows, top] = -np.inf
    log_p, p = _distribution(logits)
    mean = log_p.mean(axis=-1)
    energy = np.einsum("nv,nv->n", log_p, log_p) - log_p.shape[1] * mean**2
    return Scored(log_p, p, -log_p[rows, targets], top, best - others.max(axis=-1), energy, finite)


def compare(ref: Scored, cand: Scored, targets: Int) -> PairTokens:
    """All statistics of one pair on one document; `targets` (N,) are the true tokens.

    Centered: logits minus their mean over the vocabulary, since softmax ignores an offset and so must a tolerance.
    Log probabilities are logits minus a constant of the row, so centering either gives the same.
    """
    difference = cand.log_p - ref.log_p
    rows = np.arange(len(targets))
    kl = -np.einsum("nv,nv->n", ref.p, difference)
    difference -= difference.mean(axis=-1, keepdims=True)
    return PairTokens(
        kl=kl,
        same_top=ref.top == cand.top,
        clear=ref.margin > CLEAR_MARGIN,
        delta_p=cand.p[rows, targets] - ref.p[rows, targets],
        nll_ref=ref.nll,
        nll_cand=cand.nll,
        centered_max=np.maximum(difference.max(axis=-1), np.abs(difference.min(axis=-1))),
        error_energy=np.einsum("nv,nv->n", difference, difference),
        ref_energy=ref.energy,
        finite=ref.finite & cand.finite,
    )


def concatenate(parts: Sequence[PairTokens]) -> PairTokens:
    """The tokens of several documents, one after another."""
    return PairTokens(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(PairTokens)))


def select(pair: PairTokens, rows: NDArray[np.bool_]) -> PairTokens:
    """The tokens of one scope; `rows` (N,) is a mask."""
    return PairTokens(*(getattr(pair, field.name)[rows] for field in fields(PairTokens)))
