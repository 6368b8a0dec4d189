"""Sampling keeps what transformers' logits processors keep."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from exporter.errors import ParityFailed, UsageError
from exporter.runtime.sampling import GREEDY, Sampling, next_token, penalize, probabilities, subtract


def random_logits(seed: int, size: int = 50) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)


@given(
    seed=st.integers(0, 999),
    temperature=st.floats(0.01, 30),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.05, 1),
    penalty=st.sampled_from([1.0, 1.3, 0.8]),
)
def test_probabilities_equal_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, penalty: float
) -> None:
    logits, context = random_logits(seed), [1, 4, 4, 30]
    scores = torch.from_numpy(logits)[None].double()
    ids = torch.tensor([context])
    steps = [RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)]
    steps += [TopKLogitsWarper(top_k)] if top_k else []
    steps += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    for step in steps:
        scores = step(ids, scores)
    ours = probabilities(penalize(logits, context, penalty), Sampling(temperature, top_k, top_p))
    np.testing.assert_allclose(ours, scores.softmax(-1)[0].numpy(), atol=1e-6)
    assert ours.sum() == pytest.approx(1)


@given(
    seed=st.integers(0, 99),
    temperature=st.floats(0, exclude_min=True, allow_infinity=False),
    top_k=st.integers(0, 9),
    top_p=st.floats(0, 1, exclude_min=True),
    penalty=st.floats(0.01, 100),
)
def test_no_setting_that_is_accepted_breaks_a_draw(
    seed: int, temperature: float, top_k: int, top_p: float, penalty: float
) -> None:
    sampling = Sampling(temperature, top_k, top_p, penalty, seed)
    logits = random_logits(seed, 9) * 30
    assert 0 <= next_token(logits, [0, 3], sampling, np.random.default_rng(seed)) < 9
    assert probabilities(penalize(logits, [0, 3], penalty), sampling).sum() == pytest.approx(1)


@pytest.mark.parametrize(("presence", "frequency"), [(1.5, 0.0), (0.0, 0.7), (-0.5, 2.0)])
def test_presence_and_frequency_penalties_are_openais(presence: float, frequency: float) -> None:
    """mu[j] - c[j] * frequency - float(c[j] > 0) * presence, c counting what was sampled and not the prompt."""
    logits, prompt, sampled = random_logits(2), [3, 3, 8], [5, 9, 5, 3, 5]
    counts = Counter(sampled)
    expected = np.array([mu - counts[j] * frequency - float(counts[j] > 0) * presence for j, mu in enumerate(logits)])
    sampling = Sampling(presence_penalty=presence, frequency_penalty=frequency)
    np.testing.assert_allclose(subtract(logits, sampled, sampling), expected, rtol=1e-6)
    logits[5] = logits.max() + 0.1 + min(0.0, 3 * frequency + presence)
    penalized = subtract(logits, sampled, sampling).argmax()
    generator = np.random.default_rng()
    assert next_token(logits, prompt + sampled, sampling, generator, prompt=3) == penalized
    assert next_token(logits, prompt, sampling, generator, prompt=3) == logits.argmax()


def test_draws_follow_the_probabilities() -> None:
    logits, sampling = random_logits(3, 6), Sampling(temperature=2.0)
    generator = np.random.default_rng(0)
    counts = np.bincount([next_token(logits, [], sampling, generator) for _ in range(4000)], minlength=6)
    np.testing.assert_allclose(counts / 4000, probabilities(logits, sampling), atol=0.03)


def test_temperature_0_takes_the_largest() -> None:
    assert next_token(random_logits(1), [], GREEDY, np.random.default_rng()) == random_logits(1).argmax()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_is_never_sampled_over(value: float) -> None:
    logits = random_logits(1)
    logits[7] = value
    with pytest.raises(ParityFailed):
        next_token(logits, [], GREEDY, np.random.default_rng())


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e-300},
        {"temperature": float("nan")},
        {"seed": -1},
        {"presence_penalty": 2.1},
        {"frequency_penalty": float("nan")},
    ],
)
def test_settings_without_a_meaning_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Sampling(**options)
