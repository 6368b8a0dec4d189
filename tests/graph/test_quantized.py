"""Quantized bundles: the integers on the disk mean what the graph computes, and they are well chosen."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from exporter.errors import InputRefused, UsageError
from exporter.graph.bundle import Bundle, bundle_weights
from exporter.graph.components import ACCURACY_LEVEL
from exporter.graph.dequantize import dequantized_weights, unpack
from exporter.graph.export import export
from exporter.graph.quantize import quantize_matrix
from exporter.graph.weights import BLOCK, BLOCKS, WEIGHTS, Quantized
from exporter.runtime.load import load
from tests.graph.conftest import TinyModel, tiny_model, tokens
from tests.graph.quantizing import quantized, restored

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


@pytest.mark.parametrize("size", [16, 31, 0])
def test_a_block_size_that_the_operator_lacks_is_refused(tmp_path: Path, tiny: TinyModel, size: int) -> None:
    with pytest.raises(UsageError, match=rf"block size {size}[\s\S]*32, 64, 128, 256"):
        export(tiny.directory, precision=["int8"], block_size=size, out=tmp_path)


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
    """The best squared error over a fine grid of scales of either sign."""
    half = 1 << (bits - 1)
    scales = np.abs(block).max() / np.linspace(0.75, 1.25, 400) / half
    scales = np.concatenate([scales, -scales])[:, None]
    codes = np.clip(np.round(block / scales), -half, half - 1)
    return float(((codes * scales - block) ** 2).sum(1).min())


@pytest.mark.parametrize(("bits", "above"), [(4, 1.02), (8, 1.4)])
def test_scales_come_near_an_exhaustive_search(bits: int, above: float) -> None:
    """At 8 bits the search over 800 scales picks lucky roundings that four scales do not meet."""
    blocks = np.random.default_rng(0).standard_t(5, size=(200, BLOCK)).astype(np.float32)
    ours = float((restored(torch.from_numpy(blocks), bits).numpy() - blocks).__pow__(2).sum())
    best = sum(brute_force_error(block, bits) for block in blocks)
    assert ours < above * best


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 20), scale=st.floats(1e-2, 1e3), shift=st.floats(-3, 3), bits=st.sampled_from([4, 8]))
def test_no_value_moves_further_than_the_clipped_range_allows(seed: int, scale: float, shift: float, bits: int) -> None:
    values = torch.randn(4, BLOCK, generator=torch.Generator().manual_seed(seed)).add(shift).mul(scale)
    error = restored(values, bits) - values
    steps = values.abs().amax(1) / (1 << (bits - 1))
    assert (error.abs().amax(1) <= 1.5 * steps).all()
    assert error.norm() / values.norm() < (0.12 if bits == 4 else 0.008)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_block_of_zeros_stays_zero(bits: int) -> None:
    codes, scales = quantized(torch.zeros(1, BLOCK), bits)
    assert set(codes.flatten().tolist()) == {1 << (bits - 1)}
    assert scales.tolist() == [1.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_weights_that_have_no_scale_are_refused_by_name(tmp_path: Path, precision: str, value: float) -> None:
    tiny_model(tmp_path / "merged")
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    tensors["transformer.h.1.mlp.c_proj.weight"][40, 5] = value
    save_file(tensors, tmp_path / "merged" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputRefused, match=r"h\.1\.mlp\.c_proj\.weight.*infinite or beyond"):
        export(tmp_path / "merged", precision=[precision])
    assert not (tmp_path / precision).exists()


@pytest.mark.parametrize("bits", [4, 8])
@given(data=st.data())
def test_packing_puts_the_low_bits_first(bits: int, data: st.DataObject) -> None:
    """Whole numbers whose least is at the negative end are their own codes."""
    half = 1 << (bits - 1)
    wanted = data.draw(st.lists(st.integers(0, 2 * half - 1), min_size=BLOCK, max_size=BLOCK))
    wanted[data.draw(st.integers(0, BLOCK - 1))] = 0
    codes, scales = torch.empty(1, 1, BLOCK * bits // 8, dtype=torch.uint8), torch.empty(1, 1, dtype=torch.float16)
    quantize_matrix(torch.tensor([wanted]).float().T - half, bits, codes, scales)
    assert scales.item() == 1
    assert codes[0, 0, 0] == (wanted[0] | wanted[1] << 4 if bits == 4 else wanted[0])
    assert unpack(codes[0, 0], bits).tolist() == wanted


def test_the_manifest_counts_every_bit(tmp_path: Path, tiny: TinyModel) -> None:
    for precision, block, bits in (("int8", 32, 8.5), ("int4", 32, 4.5), ("int4", 64, 4.25)):
        bundle = export(tiny.directory, precision=[precision], block_size=block, out=tmp_path)[0]
        assert bundle.section["block"] == block
        stated = bundle.section["bits_per_weight"]
        assert stated["matrices"] == bits
        tensors = load_file(bundle.directory / WEIGHTS)
        count = sum(parameter.numel() for parameter in tiny.model.parameters())
        assert stated["all"] == round(8 * sum(tensor.nbytes for tensor in tensors.values()) / count, 4)


@settings(max_examples=16, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    heads=st.integers(1, 4),
    head_size=st.sampled_from([8, 24, 40]),
    layers=st.integers(1, 2),
    inner=st.one_of(st.none(), st.integers(1, 150)),
    vocabulary=st.integers(2, 300),
    tied=st.booleans(),
    precision=st.sampled_from(["int8", "int4"]),
    block=st.sampled_from(BLOCKS),
    level=st.sampled_from([0, 1, 4]),
    seed=st.integers(0, 1 << 16),
)
def test_random_architectures_compute_with_the_dequantized_weights(
    tmp_path_factory: pytest.TempPathFactory,
    heads: int,
    head_size: int,
    layers: int,
    inner: int | None,
    vocabulary: int,
    tied: bool,
    precision: str,
    block: int,
    level: int,
    seed: int,
) -> None:
    """Widths that blocks do not divide, odd vocabularies. Float activations: as transformers but for rounding; int8
    activations (level 4) have 127 steps a block, about 1 % of noise in each product.
    """
    directory = tmp_path_factory.mktemp("any")
    model = tiny_model(
        directory / "merged",
        seed=seed,
        n_embd=heads * head_size,
        n_head=heads,
        n_layer=layers,
        n_inner=inner,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        n_positions=9,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ACCURACY_LEVEL, "cpu", level)
        bundle = export(directory / "merged", precision=[precision], block_size=block)[0]
    onnx.checker.check_model(bundle.graph, full_check=True)
    ids = tokens(9, seed, vocabulary)
    with torch.no_grad():
        expected = carrying(bundle, model.model.config)(torch.tensor([ids])).logits[0].numpy()
    error = load(bundle, threads=1).logits(ids) - expected
    if level == 4:
        assert np.sqrt((error**2).mean()) < 0.05 * np.sqrt((expected**2).mean())
    else:
        assert np.abs(error).max() < 1e-4 * max(1.0, float(np.abs(expected).max()) / 10)
