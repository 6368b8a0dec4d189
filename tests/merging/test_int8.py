"""The int8 arithmetic against bitsandbytes itself: codes, scales, dequantized weights, and which modules have them."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    FalconConfig,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    T5Config,
)
from transformers.pytorch_utils import Conv1D

from exporter.merging.int8 import absmax_block, codes, dequantize, quantized_modules
from exporter.merging.modules import Orientation
from tests.bitsandbytes_model import bnb, int8_layers, load_in_8_bits
from tests.pairs import gpt2_config, rewrite, save_base

peft_integrations = pytest.importorskip("peft.utils.integrations")

BLOCK = 64
VOCABULARY: dict[str, Any] = {"vocab_size": 257, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}


def llama(**changes: Any) -> LlamaConfig:
    values: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2, **VOCABULARY, **changes}
    return LlamaConfig(**values)


def opt(**changes: Any) -> OPTConfig:
    values: dict[str, Any] = {"hidden_size": 64, "ffn_dim": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    values |= {"word_embed_proj_dim": 64, "max_position_embeddings": 64, **VOCABULARY, **changes}
    return OPTConfig(**values)


ARCHITECTURES = {"gpt2": gpt2_config, "llama": llama, "opt": opt}
# what 8-bit loading converts in each layer; nothing else of these models
CONVERTED = {
    "gpt2": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
    "llama": {f"self_attn.{x}_proj" for x in "qkvo"} | {f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    "opt": {f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")} | {"fc1", "fc2"},
}


@dataclass(frozen=True)
class Matrix:
    """One converted module: its weight as it is stored, and what bitsandbytes made of it, laid out [out, in]."""

    stored: torch.Tensor
    orientation: Orientation
    module: Any


def with_hard_outputs(weight: torch.Tensor, orientation: Orientation) -> torch.Tensor:
    """Overwrite the first outputs with rows on which a careless quantizer goes wrong; the type is kept."""
    rows = weight.float() if orientation == "out_in" else weight.float().T.contiguous()
    width = rows.shape[1]
    steps = torch.arange(width) % 127 - 63.0
    rows[0] = 0
    rows[1] = -0.0
    rows[2] = (steps + 0.5) * 2**-10  # ties: the absmax makes the scale 2^10
    rows[2, 0] = 127 * 2**-10
    rows[3] = (steps * 2 + 1) * 2**-6  # ties between codes of a row whose absmax is 254/2^6
    rows[3, -1] = -254 * 2**-6
    rows[4] = steps * 2**-24  # subnormal in float16
    rows[5] = 1e-9  # zero in float16 alone
    rows[6, 3] = 6e4  # an outlier: all other codes are 0
    rows[7, 0] = 2**-24
    rows[7, 1:] = 0
    rows[8] = 1 + steps * 2**-12  # float16 cannot hold it: rounded before the absmax is taken
    return (rows if orientation == "out_in" else rows.T).to(weight.dtype).contiguous()


def meta(config: Any, auto: Any = AutoModelForCausalLM) -> transformers.PreTrainedModel:
    with torch.device("meta"):
        return auto.from_config(config)


def orientation_of(module: torch.nn.Module) -> Orientation:
    return "in_out" if isinstance(module, Conv1D) else "out_in"


def matrices_of(directory: Path, config: Any, dtype: torch.dtype) -> dict[str, Matrix]:
    save_base(directory, config, dtype)
    names = quantized_modules(meta(config))
    orientation: dict[str, Orientation] = {name: orientation_of(meta(config).get_submodule(name)) for name in names}
    weights = [f"{name}.weight" for name in names]
    rewrite(
        directory / "model.safetensors",
        lambda tensors: (
            tensors | {w: with_hard_outputs(tensors[w], orientation[n]) for n, w in zip(names, weights, strict=True)}
        ),
    )
    stored = load_file(directory / "model.safetensors")
    modules = int8_layers(load_in_8_bits(directory))
    assert set(names) == set(modules)
    return {name: Matrix(stored[f"{name}.weight"], orientation[name], modules[name]) for name in names}


@pytest.fixture(scope="module", params=[torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def matrices(
    request: pytest.FixtureRequest, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Matrix]:
    return matrices_of(tmp_path_factory.mktemp("base"), ARCHITECTURES[request.param](), dtype)


def in_blocks(stored: torch.Tensor, orientation: Orientation) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes, absmax, weights) as a stream computes them: 64 stored rows at a time, Conv1D in two passes."""
    blocks = stored.split(BLOCK)
    if orientation == "out_in":
        scales = [absmax_block(block, orientation) for block in blocks]
        absmax = torch.cat(scales)
    else:
        running = None
        for block in blocks:
            running = absmax_block(block, orientation, running)
        assert running is not None
        absmax, scales = running, [running] * len(blocks)
    made = [codes(block, scale, orientation) for block, scale in zip(blocks, scales, strict=True)]
    weights = [dequantize(code, scale, orientation) for code, scale in zip(made, scales, strict=True)]
    return torch.cat(made), absmax, torch.cat(weights)


def as_stored(rows: torch.Tensor, orientation: Orientation) -> torch.Tensor:
    return rows if orientation == "out_in" else rows.T


def test_codes_and_scales_are_those_of_bitsandbytes(matrices: dict[str, Matrix], dtype: torch.dtype) -> None:
    for name, matrix in matrices.items():
        assert matrix.stored.dtype == dtype
        absmax = absmax_block(matrix.stored, matrix.orientation)
        made = codes(matrix.stored, absmax, matrix.orientation)
        assert (made.dtype, absmax.dtype) == (torch.int8, torch.float32)
        assert torch.equal(absmax, matrix.module.weight.SCB), name
        assert torch.equal(made, as_stored(matrix.module.weight.data, matrix.orientation)), name


def test_the_weights_of_the_codes_are_those_of_bitsandbytes_and_peft(matrices: dict[str, Matrix]) -> None:
    for name, matrix in matrices.items():
        weight = matrix.module.weight
        oracle = bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB)
        peft = peft_integrations.dequantize_bnb_weight(weight, state=matrix.module.state)
        made = dequantize(as_stored(weight.data, matrix.orientation), weight.SCB, matrix.orientation)
        assert made.dtype == torch.float32
        assert torch.equal(made, as_stored(oracle, matrix.orientation)), name
        assert torch.equal(made, as_stored(peft, matrix.orientation)), name


def test_blocks_give_what_the_whole_gives(matrices: dict[str, Matrix]) -> None:
    for name, matrix in matrices.items():
        if name.endswith(("c_proj", "c_fc", "down_proj", "fc2", "up_proj")):
            made, absmax, weights = in_blocks(matrix.stored, matrix.orientation)
            oracle = bnb.functional.int8_vectorwise_dequant(matrix.module.weight.data, matrix.module.weight.SCB)
            assert torch.equal(absmax, matrix.module.weight.SCB), name
            assert torch.equal(made, as_stored(matrix.module.weight.data, matrix.orientation)), name
            assert torch.equal(weights, as_stored(oracle, matrix.orientation)), name


def test_several_blocks_of_a_conv1d_with_its_absmax_in_the_last_one() -> None:
    stored = torch.randn(200, 48, generator=torch.Generator().manual_seed(3)).half()
    stored[199] *= 40
    made, absmax, _ = in_blocks(stored, "in_out")
    oracle_codes, oracle_absmax, _ = bnb.functional.int8_vectorwise_quant(stored.T.contiguous())
    assert torch.equal(absmax, oracle_absmax)
    assert torch.equal(made, oracle_codes.T)


@pytest.mark.parametrize("orientation", ["in_out", "out_in"])
def test_a_large_matrix_on_which_a_true_quotient_gives_other_codes(orientation: Orientation) -> None:
    rows = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)).half()  # [out, in]
    oracle, absmax, _ = bnb.functional.int8_vectorwise_quant(rows.clone())
    quotient = torch.round(rows.float() * torch.full_like(absmax, 127.0).div(absmax)[:, None]).to(torch.int8)
    assert not torch.equal(quotient, oracle), "the matrix is too easy: it tells no two scales apart"
    assert torch.equal(codes(as_stored(rows, orientation), absmax, orientation), as_stored(oracle, orientation))


def test_every_float16_value_has_the_scale_of_bitsandbytes() -> None:
    values = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16)  # all positive finite ones
    # The second element is about half of the first: its code is 63 or 64, whichever way the scale rounds.
    rows = torch.stack([values, (values.float() / 2).half(), -values], dim=1)
    oracle, oracle_absmax, _ = bnb.functional.int8_vectorwise_quant(rows.clone())
    absmax = absmax_block(rows, "out_in")
    assert torch.equal(absmax, oracle_absmax)
    assert torch.equal(codes(rows, absmax, "out_in"), oracle)


def test_an_output_of_zeros_has_zeros() -> None:
    rows = torch.zeros(70, 3)
    rows[:, 1] = 1e-9
    absmax = absmax_block(rows, "in_out")
    made = codes(rows, absmax, "in_out")
    assert not made.any()
    assert torch.equal(dequantize(made, absmax, "in_out"), torch.zeros(70, 3))


def test_weights_of_codes_have_the_same_codes_in_float16(matrices: dict[str, Matrix]) -> None:
    """A layer that no adapter changes loads in 8 bits as the base's did."""
    for name, matrix in matrices.items():
        made, absmax, weights = in_blocks(matrix.stored, matrix.orientation)
        again, absmax_again, _ = in_blocks(weights.half(), matrix.orientation)
        assert torch.equal(absmax_again, absmax), name
        assert torch.equal(again, made), name


@pytest.mark.parametrize("value", [1e5, float("inf"), float("nan")])
def test_a_value_beyond_float16_is_seen_in_its_absmax_and_refused(value: float) -> None:
    rows = torch.ones(4, 3)
    rows[2, 1] = value
    absmax = absmax_block(rows[3:], "in_out", absmax_block(rows[:3], "in_out"))
    assert torch.isfinite(absmax).tolist() == [True, False, True]
    assert torch.isfinite(absmax_block(rows, "out_in")).tolist() == [True, True, False, True]
    with pytest.raises(ValueError, match="float16 cannot hold it"):
        codes(rows, absmax, "in_out")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_converted_modules_are_those_of_transformers(tmp_path: Path, architecture: str, tied: bool) -> None:
    config = ARCHITECTURES[architecture](tie_word_embeddings=tied)
    save_base(tmp_path, config)
    model = load_in_8_bits(tmp_path)
    names = quantized_modules(meta(config))
    assert list(names) == list(int8_layers(model))
    assert {re.sub(r".*\.(h|layers)\.\d+\.", "", name) for name in names} == CONVERTED[architecture]
    assert isinstance(model.get_output_embeddings(), torch.nn.Linear)
    assert "lm_head" not in names


SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, **VOCABULARY}
OTHERS = {
    "opt with projections beside its layers": opt(word_embed_proj_dim=32, do_layer_norm_before=False),
    "a head of another name": GPTNeoXConfig(intermediate_size=64, max_position_embeddings=64, **SMALL),
    "a subclass of Linear": FalconConfig(**SMALL),
    "modules kept in fp32": T5Config(
        d_model=32, d_kv=16, d_ff=64, num_layers=1, decoder_start_token_id=0, **VOCABULARY
    ),
}


@pytest.mark.parametrize("kind", sorted(OTHERS))
def test_converted_modules_of_odd_architectures(tmp_path: Path, kind: str) -> None:
    config = OTHERS[kind]
    auto = AutoModelForSeq2SeqLM if isinstance(config, T5Config) else AutoModelForCausalLM
    auto.from_config(config).half().save_pretrained(tmp_path)
    model = load_in_8_bits(tmp_path, auto)
    names = quantized_modules(meta(config, auto))
    matrices = [n for n, m in meta(config, auto).named_modules() if hasattr(m, "weight") and "Linear" in str(type(m))]
    assert len(names) < len(matrices)
    assert set(names) == set(int8_layers(model))


def test_asking_changes_no_model() -> None:
    model = meta(gpt2_config())
    before = [(name, type(module)) for name, module in model.named_modules()]
    quantized_modules(model)
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert all(parameter.is_meta for parameter in model.parameters())
