"""The recorded cache error: keys and values after cached decoding against those of one prefill."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from exporter.parity.feeding import DECODED, cache_error
from exporter.runtime.load import load
from exporter.runtime.runner import Runner
from tests.parity.conftest import VOCABULARY, Made

ROW = list(range(40, 90))
PAST = len(ROW) // 2
SHORT = ROW[:3]  # a shorter row plays no part


class OnnxRuntime:
    """The graph as any caller of ONNX Runtime runs it: the cache is returned by a call and given to the next."""

    def __init__(self, path: Any) -> None:
        self.session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.past = {
            one.name: np.zeros((1, one.shape[1], 0, one.shape[3]), np.float32)
            for one in self.session.get_inputs()
            if one.name.startswith("past")
        }
        self.length = 0

    def append(self, tokens: Sequence[int]) -> None:
        self.length += len(tokens)
        feeds = {
            "input_ids": np.array([tokens]),
            "attention_mask": np.ones((1, self.length), np.int64),
            "position_ids": np.arange(self.length - len(tokens), self.length)[None],
        }
        names = [name.replace("past_key_values", "present") for name in self.past]
        presents = map(np.asarray, self.session.run(names, feeds | self.past))
        self.past = dict(zip(self.past, presents, strict=True))


@pytest.mark.parametrize(("kind", "limit"), [("merged", 1e-11), ("int8", 1e-3), ("int4", 1e-3)])
def test_a_right_bundle_has_hardly_any(made: Made, kind: str, limit: float) -> None:
    """8-bit activations may round otherwise when a token is computed alone."""
    found = cache_error(load(getattr(made, kind), threads=1), [ROW, SHORT])
    assert (found.pair, found.statistic, found.outcome, found.limit) == ("O-D", "cache_nmse", "RECORDED", None)
    assert found.estimate is not None
    assert 0 <= found.estimate < limit
    assert found.tokens == PAST + DECODED


def test_it_is_the_normalized_squared_error_of_the_worst_tensor(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding reads another token than it was given, here and in plain onnxruntime."""

    def other(token: int) -> int:
        return (token + 7) % VOCABULARY

    decode = Runner.decode
    monkeypatch.setattr(Runner, "decode", lambda self, cache, ids: decode(self, cache, list(map(other, ids))))
    found = cache_error(load(made.merged, threads=1), [SHORT, ROW])
    whole, decoded = OnnxRuntime(made.merged / "model.onnx"), OnnxRuntime(made.merged / "model.onnx")
    whole.append(ROW[: PAST + DECODED])
    decoded.append(ROW[:PAST])
    for token in ROW[PAST : PAST + DECODED]:
        decoded.append([other(token)])
    errors = {name: ((decoded.past[name] - right) ** 2).sum() / (right**2).sum() for name, right in whole.past.items()}
    worst = max(errors, key=lambda name: errors[name])
    assert found.estimate == pytest.approx(errors[worst], rel=1e-4)
    assert errors[worst] > 0.01
    assert found.detail == f"worst: {worst.removeprefix('past_key_values.')}"


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_slot_that_no_logit_has_read_yet_counts(made: Made, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """The last token's value in the last layer is lost after its logits were computed."""
    decode = Runner.decode

    def losing(self: Runner, cache: Any, ids: Sequence[int]) -> np.ndarray:
        logits = decode(self, cache, ids)
        if cache.lengths[0] == PAST + DECODED:
            cache._buffers[-1][:, :, PAST + DECODED - 1] = value
        return logits

    monkeypatch.setattr(Runner, "decode", losing)
    found = cache_error(load(made.merged, threads=1), [ROW])
    assert found.detail == "worst: 2.value"
    assert found.estimate is None if np.isnan(value) else (found.estimate or 0) > 1e-3
