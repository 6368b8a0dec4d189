"""The statistics against scipy and against llama.cpp's definitions, on fixed arrays."""

import numpy as np
import pytest
from scipy.special import log_softmax as scipy_log_softmax
from scipy.special import rel_entr, softmax

from exporter.parity.statistics import compare, concatenate, log_softmax, score, select


@pytest.fixture
def arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    ref = rng.normal(-60, 4, (40, 300)).astype(np.float32)  # an offset as real models have
    cand = ref + rng.normal(0.5, 0.05, (40, 300)).astype(np.float32)
    return ref, cand, rng.integers(0, 300, 40)


def test_log_softmax_is_scipys(arrays) -> None:
    ref, _, _ = arrays
    np.testing.assert_allclose(log_softmax(ref), scipy_log_softmax(ref.astype(np.float64), axis=-1), atol=1e-12)


def test_kl_is_scipys_relative_entropy_and_never_negative(arrays) -> None:
    ref, cand, targets = arrays
    pair = compare(score(ref, targets), score(cand, targets), targets)
    p, q = softmax(ref.astype(np.float64), axis=-1), softmax(cand.astype(np.float64), axis=-1)
    np.testing.assert_allclose(pair.kl, rel_entr(p, q).sum(axis=-1), rtol=1e-9)
    assert (pair.kl > 0).all()
    assert np.abs(compare(score(ref, targets), score(ref, targets), targets).kl).max() == 0


def test_delta_p_perplexity_and_top_follow_llama_cpp(arrays) -> None:
    """delta-p: p_cand - p_ref of the true token; ln PPL ratio: mean(nll_cand - nll_ref); same-top: equal argmax."""
    ref, cand, targets = arrays
    pair = compare(score(ref, targets), score(cand, targets), targets)
    rows = np.arange(40)
    p, q = (
        softmax(ref.astype(np.float64), axis=-1)[rows, targets],
        softmax(cand.astype(np.float64), axis=-1)[rows, targets],
    )
    np.testing.assert_allclose(pair.delta_p, q - p, atol=1e-14)
    np.testing.assert_allclose(pair.nll_cand - pair.nll_ref, np.log(p) - np.log(q), atol=1e-11)
    assert (pair.same_top == (ref.argmax(-1) == cand.argmax(-1))).all()
    ordered = np.sort(ref.astype(np.float64), axis=-1)
    assert (pair.clear == (ordered[:, -1] - ordered[:, -2] > 0.1)).all()


def test_centering_makes_an_offset_invisible_and_an_error_visible(arrays) -> None:
    ref, cand, targets = arrays
    shifted = compare(score(ref, targets), score(ref + np.float32(32), targets), targets)
    assert shifted.centered_max.max() < 1e-5
    pair = compare(score(ref, targets), score(cand, targets), targets)
    a, b = (x.astype(np.float64) - x.astype(np.float64).mean(-1, keepdims=True) for x in (ref, cand))
    np.testing.assert_allclose(pair.centered_max, np.abs(b - a).max(-1), rtol=1e-9)
    np.testing.assert_allclose(pair.error_energy, ((b - a) ** 2).sum(-1), rtol=1e-9)
    np.testing.assert_allclose(pair.ref_energy, (a**2).sum(-1), rtol=1e-9)


def test_two_independent_vectors_at_an_offset_do_not_look_alike() -> None:
    """At offset -80 two independent vectors have cosine 0.9986; their centered NMSE is about 2."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(-80, 3, (1, 50_000)), rng.normal(-80, 3, (1, 50_000))
    assert (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b) > 0.998
    nothing = np.zeros(1, np.int64)
    pair = compare(score(a, nothing), score(b, nothing), nothing)
    assert pair.error_energy[0] / pair.ref_energy[0] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_position_that_is_not_finite_is_marked_and_leaves_the_others_alone(arrays, bad: float) -> None:
    ref, cand, targets = arrays
    broken = cand.copy()
    broken[3, 5] = bad
    pair = compare(score(ref, targets), score(broken, targets), targets)
    whole = compare(score(ref, targets), score(cand, targets), targets)
    assert (~pair.finite).nonzero()[0].tolist() == [3]
    keep = np.arange(40) != 3
    np.testing.assert_array_equal(select(pair, keep).kl, select(whole, keep).kl)


def test_concatenating_and_selecting_keep_every_column(arrays) -> None:
    ref, cand, targets = arrays
    pair = compare(score(ref, targets), score(cand, targets), targets)
    again = select(concatenate([pair, pair]), np.arange(80) >= 40)
    for name in pair.__slots__:
        np.testing.assert_array_equal(getattr(again, name), getattr(pair, name))
