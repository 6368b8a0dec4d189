"""Quantized bundles: the integers on the disk mean what the graph computes, and they are well chosen."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2LMHeadModel

from exporter.graph import Bundle, dequantized_weights, export
from exporter.graph.bundle import bundle_weights
from exporter.graph.export import ACCURACY_LEVEL
from exporter.graph.quantize import BLOCK, pack, quantize_blocks
from exporter.graph.weights import WEIGHTS, Quantized, unpack
from exporter.runtime.load import load
from tests.graph.conftest import TinyModel, tiny_model, tokens

IDS = tokens(24)


def carrying(bundle: Bundle, config: object) -> GPT2LMHeadModel:
    """transformers' model with the bundle's dequantized weights."""
    model = GPT2LMHeadModel(config).eval()
    model.load_state_dict(dict(dequantized_weights(bundle)), strict=False)
    model.tie_weights()
    return model


def logits(model: GPT2LMHeadModel) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].numpy()


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": False, "n_inner": 96}], ids=["tied", "untied"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_graph_computes_with_exactly_the_dequantized_weights(
    tmp_path: Path, precision: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ACCURACY_LEVEL, "cpu", 1)  # float activations
    model = tiny_model(tmp_path / "merged", **options)
    bundle = export(tmp_path / "merged", precision=[precision])[0]
    expected = logits(carrying(bundle, model.model.config))
    np.testing.assert_allclose(load(bundle, threads=1).logits(IDS), expected, atol=1e-4, rtol=0)
    assert np.abs(expected - model.logits(IDS)).max() > 1e-3  # else quantization did nothing


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_int8_activations_stay_near(tmp_path: Path, tiny: TinyModel, precision: str) -> None:
    bundle = export(tiny.directory, precision=[precision], out=tmp_path)[0]
    assert bundle.section["accuracy_level"] == 4
    expected = logits(carrying(bundle, tiny.model.config))
    error = load(bundle, threads=1).logits(IDS) - expected
    assert np.sqrt((error**2).mean()) < 0.04 * expected.std()


def test_4_bits_keep_embedding_and_head_at_8(tmp_path: Path, tiny: TinyModel) -> None:
    weights = bundle_weights(export(tiny.directory, precision=["int4"], out=tmp_path)[0])
    bits = {name: weight.bits for name, weight in weights.items() if isinstance(weight, Quantized)}
    assert bits.pop("transformer.wte.weight") == 8
    assert set(bits.values()) == {4}
    assert len(bits) == 4 * tiny.model.config.n_layer


def test_the_size_of_the_row_blocks_changes_no_byte(
    tmp_path: Path, tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = export(tiny.directory, precision=["int4"], out=tmp_path / "whole")[0]
    monkeypatch.setattr("exporter.graph.quantized_file.ELEMENTS", 1000)
    blocks = export(tiny.directory, precision=["int4"], out=tmp_path / "blocks")[0]
    assert (whole.directory / WEIGHTS).read_bytes() == (blocks.directory / WEIGHTS).read_bytes()


@pytest.mark.parametrize(("precision", "bound"), [("int8", 0.006), ("int4", 0.085)])
def test_every_weight_is_near_the_checkpoints(tmp_path: Path, tiny: TinyModel, precision: str, bound: float) -> None:
    state = tiny.model.state_dict()
    found = dict(dequantized_weights(export(tiny.directory, precision=[precision], out=tmp_path)[0]))
    assert found.keys() == state.keys() - {"lm_head.weight"}
    for name, value in found.items():
        error = float((value - state[name]).norm() / state[name].norm())
        assert error <= bound, name
        if value.dim() == 1 or name == "transformer.wpe.weight":
            assert error == 0, name


def brute_force_error(block: np.ndarray, bits: int) -> float:
    """The best squared error over a fine grid of ranges [low, high] that hold 0."""
    top, best = (1 << bits) - 1, np.inf
    low, high = min(block.min(), 0), max(block.max(), 0)
    for a in np.linspace(0.4, 1.0, 25):
        for b in np.linspace(0.4, 1.0, 25):
            scale = (high * b - low * a) / top
            zero = np.clip(np.round(-low * a / scale), 0, top)
            codes = np.clip(np.round(block / scale) + zero, 0, top)
            best = min(best, float((((codes - zero) * scale - block) ** 2).sum()))
    return best


def test_4_bit_scales_come_near_an_exhaustive_search() -> None:
    blocks = np.random.default_rng(0).standard_t(5, size=(40, BLOCK)).astype(np.float32)
    q = quantize_blocks(torch.from_numpy(blocks), 4, torch.float32)
    assert q.zero_points is not None
    values = (q.codes.float() - q.zero_points.float()[:, None]) * q.scales[:, None]
    ours = (values.numpy() - blocks).__pow__(2).sum()
    best = sum(brute_force_error(block, 4) for block in blocks)
    plain = quantize_plainly(blocks)
    assert ours < 1.02 * best
    assert ours < 0.97 * plain


def quantize_plainly(blocks: np.ndarray) -> float:
    low, high = np.minimum(blocks.min(1), 0), np.maximum(blocks.max(1), 0)
    scale = (high - low) / 15
    zero = np.round(-low / scale)
    codes = np.clip(np.round(blocks / scale[:, None]) + zero[:, None], 0, 15)
    return float((((codes - zero[:, None]) * scale[:, None] - blocks) ** 2).sum())


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1 << 20),
    scale=st.floats(1e-6, 1e3),
    shift=st.floats(-3, 3),
    bits=st.sampled_from([4, 8]),
    half=st.booleans(),
)
def test_no_value_moves_further_than_the_clipped_range_allows(
    seed: int, scale: float, shift: float, bits: int, half: bool
) -> None:
    values = torch.randn(4, BLOCK, generator=torch.Generator().manual_seed(seed)).add(shift).mul(scale)
    q = quantize_blocks(values, bits, torch.float16 if half else torch.float32)
    zero = torch.full_like(q.scales, 128.0) if q.zero_points is None else q.zero_points.float()
    restored = (q.codes.float() - zero[:, None]) * q.scales[:, None]
    spread = values.amax(1).clamp(min=0) - values.amin(1).clamp(max=0)
    assert torch.isfinite(restored).all()
    if scale > 1e-4:  # below, float16 scales are subnormal
        assert ((restored - values).abs().amax(1) <= spread * 0.5).all()
        assert ((restored - values).norm() / values.norm()) < (0.2 if bits == 4 else 0.02)


def test_a_block_of_zeros_stays_zero() -> None:
    for bits in (4, 8):
        q = quantize_blocks(torch.zeros(1, BLOCK), bits, torch.float32)
        zero = 128 if q.zero_points is None else int(q.zero_points[0])
        assert set(q.codes.flatten().tolist()) == {zero}
        assert torch.isfinite(q.scales).all()


@given(st.lists(st.integers(0, 15), min_size=1, max_size=9))
def test_packing_puts_the_low_bits_first(codes: list[int]) -> None:
    packed = pack(torch.tensor(codes, dtype=torch.uint8), 4)
    assert packed.tolist()[0] == codes[0] | (codes[1] << 4 if len(codes) > 1 else 0)
    assert unpack(packed, 4).tolist()[: len(codes)] == codes
