"""Shares by stage: they sum to one and point at the stage that erred."""

import numpy as np
import pytest

from exporter.parity.attribution import Chain
from exporter.parity.statistics import kl_divergence, log_softmax


def chain_of(*errors: float, seed: int = 0) -> tuple[Chain, list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    logits = [rng.normal(0, 3, (64, 500))]
    for error in errors:
        logits.append(logits[-1] + error * rng.normal(0, 1, (64, 500)))
    chain = Chain("T to O", [f"m{i}" for i in range(len(logits))])
    log_p = [log_softmax(one) for one in logits]
    add(chain, [one[:30] for one in log_p])
    other = Chain(chain.name, chain.models)
    add(other, [one[30:] for one in log_p])
    chain.include(other)
    return chain, log_p


def add(chain: Chain, log_p: list[np.ndarray]) -> None:
    chain.add(log_p, [np.exp(one) for one in log_p])


def test_shares_sum_to_one_and_follow_the_variances() -> None:
    chain, _ = chain_of(0.01, 0.03, 0.02)
    shares = chain.shares()
    assert shares is not None
    assert sum(shares) == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(shares, np.array([1, 9, 4]) / 14, atol=0.05)


def test_the_whole_variance_is_twice_the_kl() -> None:
    """KL(T||O) is about Var_p(e) / 2 for small errors: the shares divide what KL measures."""
    chain, log_p = chain_of(0.01, 0.02)
    whole = kl_divergence(log_p[0], log_p[-1]).sum()
    assert chain._covariance.sum() / 2 == pytest.approx(whole, rel=0.02)


def test_a_stage_that_takes_an_error_back_has_a_negative_share() -> None:
    rng = np.random.default_rng(1)
    start = rng.normal(0, 3, (50, 400))
    error = 0.02 * rng.normal(0, 1, (50, 400))
    chain = Chain("c", ("a", "b", "c"))
    add(chain, [log_softmax(start), log_softmax(start + error), log_softmax(start + 0.5 * error)])
    shares = chain.shares()
    assert shares is not None
    np.testing.assert_allclose(shares, [2, -1], atol=0.01)


def test_equal_ends_have_no_shares() -> None:
    chain, _ = chain_of(0.0, 0.0)
    assert chain.shares() is None
    assert chain.kl() == [0, 0]
