"""One-sided 95 % confidence bounds over documents: the document, not the token, is the unit that was sampled.

Every gated statistic is a smooth function of sums over documents (a mean is sum(y) / sum(tokens)). Its bounds come from
the studentized bootstrap: resample documents, compute t = (theta* - theta) / se*, and invert. The plain percentile
bootstrap covers only 74-87 % at 32 skewed documents. Efron and Tibshirani, An Introduction to the Bootstrap,
ch. 12.5.

Coverage of the upper and the lower bound, and of the plain bootstrap's upper one, simulated for documents of 16-64
tokens whose means are log-normal with sigma (1,500-4,000 samples, standard error below 0.7 %):

    32 documents, sigma 1.0   90.2 %  96.1 %   plain 84.8 %
    32 documents, sigma 0.5   93.4 %  95.4 %   plain 91.0 %
    120 documents, sigma 1.0  93.0 %  95.5 %   plain 89.7 %
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
Statistic = Callable[[Float], Float]  # (..., K) sums -> (...)

CONFIDENCE = 0.95
RESAMPLES = 2000
SEED = 20230401


@dataclass(frozen=True, slots=True)
class Bounds:
    """An estimate with its one-sided bounds: each holds with 95 % confidence on its own."""

    estimate: float
    lower: float
    upper: float


def studentized_bootstrap(columns: Float, statistic: Statistic, resamples: int = RESAMPLES) -> Bounds:
    """Bounds of `statistic(columns.sum(axis=0))`; `columns` (D, K) holds each document's sums.

    The statistic must not change when all sums are scaled alike (a ratio is such): the standard error is then the
    delta method's, sqrt(D / (D - 1) * sum_d (g . x_d)^2) with g the gradient at the sums. One document has no spread:
    its bounds are infinite.
    """
    documents = len(columns)
    total = columns.sum(axis=0)
    estimate = float(statistic(total))
    if documents < 2:
        return Bounds(estimate, -np.inf, np.inf)
    error = float(_standard_errors(columns, np.ones((1, documents)), statistic)[0])
    if error == 0:
        return Bounds(estimate, estimate, estimate)
    counts = _resampled_counts(documents, resamples)
    centre = statistic(counts @ columns)
    errors = _standard_errors(columns, counts, statistic)
    moved = centre - estimate
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(errors > 0, moved / errors, np.where(moved == 0, 0.0, np.sign(moved) * np.inf))
    low, high = np.quantile(t, [1 - CONFIDENCE, CONFIDENCE], method="closest_observation")
    return Bounds(estimate, estimate - error * float(high), estimate - error * float(low))


def percentile_bootstrap(values: Float, document: NDArray[np.int64], quantile: float, resamples: int = 400) -> Bounds:
    """Bounds of a quantile of `values` (N,) of tokens, resampling the documents that `document` (N,) names.

    A quantile has no smooth standard error, so this is the plain percentile bootstrap; it is only gated with many
    documents (see thresholds.toml).
    """
    order = np.argsort(values)
    ordered, owner = values[order], np.unique(document, return_inverse=True)[1][order]
    counts = _resampled_counts(int(owner.max()) + 1, resamples)
    picked = np.empty(resamples)
    for i, count in enumerate(counts):
        weight = np.cumsum(count[owner])
        picked[i] = ordered[np.searchsorted(weight, quantile * weight[-1])]
    low, high = np.quantile(picked, [1 - CONFIDENCE, CONFIDENCE])
    return Bounds(float(np.quantile(values, quantile)), float(low), float(high))


def rate_bounds(hits: Float, tokens: Float) -> Bounds:
    """Bounds of a rate sum(hits) / sum(tokens) over documents, never narrower than Clopper-Pearson over documents.

    `hits`, `tokens` (D,). Where no document misses, the bootstrap's interval has no width at all; a mean of D values in
    [0, 1] is never more certain than D coin flips of that mean.
    """
    columns = np.stack([hits, tokens], axis=1)
    bounds = studentized_bootstrap(columns, ratio)
    documents = len(hits)
    successes = bounds.estimate * documents
    alpha = 1 - CONFIDENCE
    low = beta_quantile(alpha, successes, documents - successes + 1) if successes > 0 else 0.0
    high = beta_quantile(1 - alpha, successes + 1, documents - successes) if successes < documents else 1.0
    return Bounds(bounds.estimate, max(0.0, min(bounds.lower, low)), min(1.0, max(bounds.upper, high)))


def ratio(sums: Float) -> Float:
    """First sum over the second: the token-weighted mean of documents."""
    return sums[..., 0] / sums[..., 1]


def _resampled_counts(documents: int, resamples: int) -> Float:
    """(resamples, documents): how often each document was drawn. The seed is fixed: a verdict must repeat."""
    rng = np.random.default_rng(SEED)
    return rng.multinomial(documents, np.full(documents, 1 / documents), size=resamples).astype(np.float64)


def _standard_errors(columns: Float, counts: Float, statistic: Statistic) -> Float:
    """Delta-method standard errors of resamples, (R,). The gradient is a central difference, exact enough at 1e-5."""
    sums = counts @ columns  # (R, K)
    documents = len(columns)
    scale = np.abs(columns).sum(axis=0)  # (K,)
    gradient = np.empty_like(sums)
    for k in range(columns.shape[1]):
        step = 1e-5 * scale[k] if scale[k] > 0 else 1.0
        up, down = sums.copy(), sums.copy()
        up[:, k] += step
        down[:, k] -= step
        gradient[:, k] = (statistic(up) - statistic(down)) / (2 * step)
    influence = gradient @ columns.T  # (R, D); its weighted sum is zero for a scale-free statistic
    return np.sqrt(documents / (documents - 1) * (counts * influence**2).sum(axis=1))


def beta_quantile(probability: float, a: float, b: float) -> float:
    """x with I_x(a, b) = probability, by bisection: Clopper-Pearson's bounds are such quantiles."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _incomplete_beta(middle, a, b) < probability else (low, middle)
    return (low + high) / 2


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularized incomplete beta function by Lentz's continued fraction (Numerical Recipes, 6.4)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 500):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d, c = 1 / (1 + term * d), 1 + term / c
            fraction *= c * d
        if abs(c * d - 1) < 1e-14:
            break
    return front * fraction
