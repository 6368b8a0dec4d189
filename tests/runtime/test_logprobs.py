"""Log-probabilities are torch's."""

import numpy as np
import pytest
import torch

from exporter.runtime.logprobs import logprobs


@pytest.mark.parametrize("top", [0, 1, 5, 50, 60])
def test_log_probabilities_are_log_softmax_and_the_best_come_first(top: int) -> None:
    logits = np.random.default_rng(top).normal(0, 5, 50).astype(np.float32)
    expected = torch.from_numpy(logits).double().log_softmax(0)
    own, best = logprobs(logits, 17, top)
    assert own == pytest.approx(float(expected[17]), abs=1e-9)
    values, ids = expected.topk(min(top, 50))
    assert [token for token, _ in best] == ids.tolist()
    np.testing.assert_allclose([value for _, value in best], values.numpy(), atol=1e-9)


def test_of_equals_the_lower_id_comes_first_and_a_large_logit_does_not_overflow() -> None:
    logits = np.array([1e30, 0, 1e30, 1e30], np.float32)
    own, best = logprobs(logits, 1, 2)
    assert best == ((0, pytest.approx(-np.log(3))), (2, pytest.approx(-np.log(3))))
    assert own == pytest.approx(-1e30)
