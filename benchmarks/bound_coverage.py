"""How often one-sided 95 % bounds hold, by simulation at each level's number of documents (make coverage).

Documents of 16 to 64 scored tokens. Means: log-normal with sigma 0.5 and 1. Rates: each document misses at a rate of
its own, beta-distributed with mean 2 %. Seeds are fixed. A Markdown table on stdout.
"""

from collections.abc import Callable

import numpy as np

from exporter.parity.intervals import Bounds, percentile_bootstrap, rate_bounds, ratio, studentized_bootstrap

LEVELS = {"commit": 32, "nightly": 120, "release": 136}
SIMULATIONS, RESAMPLES, MISSES = 1500, 500, 0.02
Draw = Callable[[np.random.Generator, int], tuple[float, Bounds]]  # the truth and its bounds


def log_normal_mean(sigma: float) -> Draw:
    def draw(rng: np.random.Generator, documents: int) -> tuple[float, Bounds]:
        tokens = rng.integers(16, 65, documents).astype(float)
        columns = np.stack([tokens * rng.lognormal(0, sigma, documents), tokens], axis=1)
        return float(np.exp(sigma**2 / 2)), studentized_bootstrap(columns, ratio, RESAMPLES)

    return draw


def plain_bootstrap(sigma: float) -> Draw:
    """What is not used: percentiles of the resampled mean."""

    def draw(rng: np.random.Generator, documents: int) -> tuple[float, Bounds]:
        tokens = rng.integers(16, 65, documents).astype(float)
        columns = np.stack([tokens * rng.lognormal(0, sigma, documents), tokens], axis=1)
        sums = columns[rng.integers(0, documents, (RESAMPLES, documents))].sum(axis=1)
        low, high = np.quantile(sums[:, 0] / sums[:, 1], [0.05, 0.95])
        return float(np.exp(sigma**2 / 2)), Bounds(0.0, float(low), float(high))

    return draw


def miss_rate(rng: np.random.Generator, documents: int) -> tuple[float, Bounds]:
    tokens = rng.integers(16, 65, documents)
    hits = tokens - rng.binomial(tokens, rng.beta(0.5, 0.5 / MISSES - 0.5, documents))
    return 1 - MISSES, rate_bounds(hits.astype(float), tokens.astype(float))


def tail(rng: np.random.Generator, documents: int) -> tuple[float, Bounds]:
    """The 99th percentile of exponential values with a scale for each document."""
    scale = np.exp(rng.normal(0, 0.3, documents))
    document = np.repeat(np.arange(documents), 60)
    return _TAIL, percentile_bootstrap(rng.exponential(scale[document]), document, 0.99, 200)


def _tail_truth() -> float:
    rng = np.random.default_rng(0)
    return float(np.quantile(rng.exponential(np.exp(rng.normal(0, 0.3, 4_000_000))), 0.99))


_TAIL = _tail_truth()
ROWS: dict[str, tuple[Draw, int]] = {
    "mean, sigma 0.5": (log_normal_mean(0.5), SIMULATIONS),
    "mean, sigma 1": (log_normal_mean(1.0), SIMULATIONS),
    "mean, sigma 1, plain bootstrap (not used)": (plain_bootstrap(1.0), SIMULATIONS),
    "rate, 2 % misses": (miss_rate, 600),
    "99th percentile": (tail, 300),
}


def coverage(draw: Draw, documents: int, simulations: int) -> tuple[float, float]:
    """Shares of simulations in which the upper and the lower bound held."""
    rng = np.random.default_rng(documents)
    below = above = 0
    for _ in range(simulations):
        truth, bounds = draw(rng, documents)
        below += truth <= bounds.upper
        above += truth >= bounds.lower
    return below / simulations, above / simulations


def main() -> None:
    print("| statistic | " + " | ".join(f"{name}, {count} documents" for name, count in LEVELS.items()) + " |")
    print("|---" * (len(LEVELS) + 1) + "|")
    for name, (draw, simulations) in ROWS.items():
        cells = [coverage(draw, count, simulations) for count in LEVELS.values()]
        print(
            f"| {name} | " + " | ".join(f"{100 * up:.1f} %, {100 * low:.1f} %" for up, low in cells) + " |", flush=True
        )


if __name__ == "__main__":
    main()
