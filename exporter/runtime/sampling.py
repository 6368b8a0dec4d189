"""From logits to the next token. Order and meaning are transformers' logits processors'."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from exporter.errors import ParityFailed, UsageError

LARGEST_PENALTY = 100.0  # a logit stays far from overflow


@dataclass(frozen=True, slots=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 keep every token; repetition_penalty 1 changes nothing."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and np.isfinite(self.temperature)):
            raise UsageError(f"temperature {self.temperature}", expected="0 (greedy) or more")
        if self.top_k < 0:
            raise UsageError(f"top_k {self.top_k}", expected="0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p {self.top_p}", expected="above 0, at most 1")
        if not 1 / LARGEST_PENALTY <= self.repetition_penalty <= LARGEST_PENALTY:
            raise UsageError(
                f"repetition_penalty {self.repetition_penalty}",
                expected=f"{1 / LARGEST_PENALTY:g} to {LARGEST_PENALTY:g}; 1 changes nothing",
            )
        if self.seed < 0:
            raise UsageError(f"seed {self.seed}", expected="0 or more")


GREEDY = Sampling()


def generators(sampling: Sampling, rows: int) -> list[np.random.Generator]:
    """A generator per row: what a row draws does not depend on the rows beside it."""
    return [np.random.default_rng([sampling.seed, row]) for row in range(rows)]


def next_token(logits: np.ndarray, context: Sequence[int], sampling: Sampling, generator: np.random.Generator) -> int:
    """One token from logits (V,), after the tokens `context`. ParityFailed when a logit is not finite."""
    if not np.isfinite(logits).all():
        raise ParityFailed(
            "the model gave a logit that is not finite", expected="finite logits", todo="verify the bundle"
        )
    if sampling.repetition_penalty != 1.0:
        logits = penalize(logits, context, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(logits.argmax())
    return int(generator.choice(len(logits), p=probabilities(logits, sampling)))


def penalize(logits: np.ndarray, context: Sequence[int], penalty: float) -> np.ndarray:
    """Tokens seen before become less likely (Keskar et al., 2019, arXiv:1909.05858): l / p if l > 0 else l * p."""
    seen = np.unique(np.asarray(context, np.int64))
    logits = logits.copy()
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return logits


def probabilities(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """float64 (V,) that sums to 1: temperature, then top-k, then top-p (the smallest set whose mass reaches p)."""
    scaled = logits.astype(np.float64) - logits.max()
    with np.errstate(over="ignore"):  # near temperature 0 what is below the best is infinitely so
        scaled /= sampling.temperature
    if 0 < sampling.top_k < len(scaled):
        scaled[scaled < np.partition(scaled, -sampling.top_k)[-sampling.top_k]] = -np.inf
    if sampling.top_p < 1:
        order = np.argsort(-scaled, kind="stable")
        mass = np.cumsum(_softmax(scaled[order]))
        scaled[order[1:][mass[:-1] >= sampling.top_p]] = -np.inf
    return _softmax(scaled)


def _softmax(x: np.ndarray) -> np.ndarray:
    exponentials = np.exp(x - x.max())
    return exponentials / exponentials.sum()
