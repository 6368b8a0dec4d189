"""From logits to the next token. Order and meaning are transformers' logits processors'; two penalties are OpenAI's."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from exporter.errors import ParityFailed, UsageError

LARGEST_PENALTY = 100.0  # a logit stays far from overflow
LARGEST_SUBTRACTED = 2.0  # OpenAI's range for the presence and the frequency penalty: -2 to 2


@dataclass(frozen=True, slots=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 keep every token; repetition_penalty 1 changes nothing.

    A token generated c times before has presence_penalty (if c > 0) and c * frequency_penalty taken off its logit:
    OpenAI's definition, in which the prompt does not count. 0 changes nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

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
        for name in ("presence_penalty", "frequency_penalty"):
            if not -LARGEST_SUBTRACTED <= getattr(self, name) <= LARGEST_SUBTRACTED:
                raise UsageError(f"{name} {getattr(self, name)}", expected="-2 to 2; 0 changes nothing")


GREEDY = Sampling()


def generators(sampling: Sampling, rows: int) -> list[np.random.Generator]:
    """A generator per row: what a row draws does not depend on the rows beside it."""
    return [np.random.default_rng([sampling.seed, row]) for row in range(rows)]


def next_token(
    logits: np.ndarray, context: Sequence[int], sampling: Sampling, generator: np.random.Generator, prompt: int = 0
) -> int:
    """One token from logits (V,), after the tokens `context`, of which `prompt` were given and the rest generated.

    ParityFailed when a logit is not finite.
    """
    require_finite(logits)
    if sampling.repetition_penalty != 1.0:
        logits = penalize(logits, context, sampling.repetition_penalty)
    if sampling.presence_penalty or sampling.frequency_penalty:
        logits = subtract(logits, context[prompt:], sampling)
    if sampling.temperature == 0:
        return int(logits.argmax())
    ids, chances = _candidates(logits, sampling)
    return int(ids[generator.choice(len(ids), p=chances)])


def require_finite(logits: np.ndarray) -> None:
    """ParityFailed when a logit is not finite."""
    if not np.isfinite(logits).all():
        raise ParityFailed(
            "the model gave a logit that is not finite", expected="finite logits", todo="verify the bundle"
        )


def subtract(logits: np.ndarray, generated: Sequence[int], sampling: Sampling) -> np.ndarray:
    """l - c * frequency - (c > 0) * presence, c being how often a token was generated before."""
    seen, counts = np.unique(np.asarray(generated, np.int64), return_counts=True)
    logits = logits.copy()
    logits[seen] -= counts * sampling.frequency_penalty + sampling.presence_penalty
    return logits


def penalize(logits: np.ndarray, context: Sequence[int], penalty: float) -> np.ndarray:
    """Tokens seen before become less likely (Keskar et al., 2019, arXiv:1909.05858): l / p if l > 0 else l * p."""
    seen = np.unique(np.asarray(context, np.int64))
    logits = logits.copy()
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return logits


def probabilities(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """float64 (V,) that sums to 1: temperature, then top-k, then top-p (the smallest set whose mass reaches p)."""
    chances = np.zeros(len(logits))
    ids, kept = _candidates(logits, sampling)
    chances[ids] = kept
    return chances


def _candidates(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that may be drawn, in order, and their probabilities; sorting all of a vocabulary would take longer
    than a small model's step, so only what can be in the nucleus is sorted.
    """
    scaled = logits.astype(np.float64) - logits.max()
    with np.errstate(over="ignore"):  # near temperature 0 what is below the best is infinitely so
        scaled /= sampling.temperature
    ids = np.arange(len(scaled))
    if 0 < sampling.top_k < len(scaled):
        ids = np.flatnonzero(scaled >= np.partition(scaled, -sampling.top_k)[-sampling.top_k])
    chances = _softmax(scaled[ids])
    if sampling.top_p < 1:
        # All the tokens less likely than (1 - p) / V together weigh less than 1 - p: the rest reaches p without them.
        likely = np.flatnonzero(chances >= (1 - sampling.top_p) / len(scaled))
        order = likely[np.argsort(-chances[likely], kind="stable")]
        mass = np.cumsum(chances[order])
        ids = ids[np.sort(order[: 1 + np.count_nonzero(mass[:-1] < sampling.top_p)])]
        chances = _softmax(scaled[ids])
    return ids, chances


def _softmax(x: np.ndarray) -> np.ndarray:
    exponentials = np.exp(x - x.max())
    return exponentials / exponentials.sum()
