"""int8-exact against bitsandbytes itself for the codes, and against transformers and PEFT for the logits."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from exporter.errors import InputRefused, UsageError
from exporter.graph.bundle import Bundle
from exporter.graph.components import ACCURACY_LEVEL
from exporter.graph.dequantize import dequantized_weights
from exporter.graph.export import export
from exporter.graph.weights import WEIGHTS, Quantized, open_weights
from exporter.parity.elements import read_values, within_step
from exporter.runtime.load import load
from tests.bitsandbytes_model import bnb, int8_layers, load_in_8_bits
from tests.graph.conftest import tokens
from tests.pairs import Pair, gpt2_config, lora_config, make_pair, rewrite, save_adapter

IDS = tokens(40)
# Everything that 8-bit loading converts, several ranks, and a scale that is no power of two.
WIDE = {"r": 3, "lora_alpha": 7, "target_modules": ["c_attn", "c_proj", "c_fc"], "rank_pattern": {"c_fc": 5}}
CONFIGS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "odd widths": {"n_embd": 72, "n_head": 3, "n_inner": 101, "vocab_size": 259},
}


@dataclass(frozen=True, slots=True)
class Exported:
    pair: Pair
    bundle: Bundle


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """float16, with float activations in the graph and a chat template of the adapter's own."""
    directory = tmp_path_factory.mktemp("exact")
    pair = make_pair(directory, gpt2_config(**CONFIGS[request.param]), lora=lora_config(**WIDE))
    (pair.adapter / "chat_template.jinja").write_text("{{ messages[0]['content'] }}\r\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ACCURACY_LEVEL, "cpu", 1)
        return Exported(pair, exact(pair, directory / "out"))


def exact(pair: Pair, out: Path, *adapters: Path) -> Bundle:
    return export(base=pair.base, adapter=adapters or pair.adapter, precision=["int8-exact"], out=out)[0]


def quantized_by_bitsandbytes(base: Path) -> dict[str, Any]:
    return int8_layers(load_in_8_bits(base))


def test_codes_and_scales_are_those_of_bitsandbytes(exported: Exported) -> None:
    tensors = load_file(exported.bundle.directory / WEIGHTS)
    modules = quantized_by_bitsandbytes(exported.pair.base)
    assert len(modules) == 12
    for name, module in modules.items():
        key = next(key for key in tensors if key.startswith(f"{name}.weight.int8") and not key.endswith(".scales"))
        codes, scales = tensors[key], tensors[f"{key}.scales"]
        outputs, inputs = module.weight.data.shape
        signed = codes.reshape(outputs, -1).to(torch.int16) - 128
        assert torch.equal(signed[:, :inputs].to(torch.int8), module.weight.data), name
        assert not signed[:, inputs:].any()
        assert scales.dtype == torch.float32
        row = module.weight.SCB * torch.tensor(7.874015718698502e-3)  # as bitsandbytes' int8_vectorwise_dequant
        assert torch.equal(scales, row.unsqueeze(1).expand_as(scales)), name


def test_everything_else_keeps_its_stored_bytes(exported: Exported) -> None:
    tensors, base = load_file(exported.bundle.directory / WEIGHTS), load_file(exported.pair.base / "model.safetensors")
    converted = {f"{name}.weight" for name in quantized_by_bitsandbytes(exported.pair.base)}
    kept = base.keys() - converted
    assert {"transformer.wte.weight", "transformer.h.0.attn.c_attn.bias"} <= kept
    for name in kept:
        assert torch.equal(tensors[name], base[name])
        assert tensors[name].dtype == torch.float16


def peft_over_the_codes(pair: Pair, *adapters: Path) -> torch.nn.Module:
    """PEFT's model in float32 over what bitsandbytes' codes mean, dequantized by bitsandbytes."""
    model = AutoModelForCausalLM.from_pretrained(pair.base, dtype=torch.float32)
    for name, module in quantized_by_bitsandbytes(pair.base).items():
        weight = bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
        model.get_submodule(name).weight.data = weight.T.contiguous()  # Conv1D
    first, *more = adapters or (pair.adapter,)
    peft_model: Any = PeftModel.from_pretrained(model, str(first), adapter_name="0")
    for i, path in enumerate(more, start=1):
        peft_model.load_adapter(str(path), adapter_name=str(i))
    peft_model.base_model.set_adapter([str(i) for i in range(1 + len(more))])
    return peft_model.eval()


def logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].numpy()


def test_logits_are_those_of_peft_over_the_dequantized_base(exported: Exported) -> None:
    expected = logits(peft_over_the_codes(exported.pair))
    runner = load(exported.bundle, threads=1)
    np.testing.assert_allclose(runner.logits(IDS), expected, atol=1e-4, rtol=0)
    cache = runner.new_cache(1)
    runner.prefill(cache, 0, IDS[:-1])
    np.testing.assert_allclose(runner.decode(cache, IDS[-1:])[0], expected[-1], atol=1e-4, rtol=0)
    without = logits(AutoModelForCausalLM.from_pretrained(exported.pair.base, dtype=torch.float32).eval())
    assert np.abs(expected - without).max() > 0.01, "the adapter does nothing: no evidence"


def test_dequantized_weights_hold_the_adapter(exported: Exported) -> None:
    """What `verify` compares: one matrix for each module, with the product added."""
    model = GPT2LMHeadModel(AutoModelForCausalLM.from_pretrained(exported.pair.base).config).eval()
    model.load_state_dict(dict(dequantized_weights(exported.bundle)), strict=False)
    model.tie_weights()
    np.testing.assert_allclose(logits(model), logits(peft_over_the_codes(exported.pair)), atol=1e-4, rtol=0)


def test_int8_activations_as_shipped_stay_as_near_as_8_bit_loading_itself(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, lora=lora_config(**WIDE))
    bundle = exact(pair, tmp_path / "out")
    assert bundle.section["accuracy_level"] == 4
    expected = logits(peft_over_the_codes(pair))
    reference = logits(PeftModel.from_pretrained(load_in_8_bits(pair.base), str(pair.adapter)).eval().float())
    error = load(bundle, threads=1).logits(IDS) - expected
    assert np.sqrt((error**2).mean()) < 2 * np.sqrt(((reference - expected) ** 2).mean())


def test_several_adapters_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ACCURACY_LEVEL, "cpu", 0)
    pair = make_pair(tmp_path)
    second = tmp_path / "second"
    model = AutoModelForCausalLM.from_pretrained(pair.base)
    save_adapter(second, model, LoraConfig(**WIDE, fan_in_fan_out=True), seed=5)
    runner = load(exact(pair, tmp_path / "out", pair.adapter, second), threads=1)
    expected = logits(peft_over_the_codes(pair, pair.adapter, second))
    np.testing.assert_allclose(runner.logits(IDS), expected, atol=1e-4, rtol=0)


def test_the_bundle_is_complete_alone_and_opens_everywhere(exported: Exported) -> None:
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    directory = exported.bundle.directory
    onnx.checker.check_model(exported.bundle.graph, full_check=True)
    assert (directory / "tokenizer.json").read_bytes() == (exported.pair.base / "tokenizer.json").read_bytes()
    assert (directory / "config.json").read_bytes() == (exported.pair.base / "config.json").read_bytes()
    assert (directory / "chat_template.jinja").read_bytes() == b"{{ messages[0]['content'] }}\r\n"
    section = exported.bundle.section
    assert section["bits_per_weight"]["matrices"] >= 9
    assert {file.name for file in directory.iterdir() if file.name != "exporter.json"} == set(section["files"])
    ours = load(directory, threads=1).generate([IDS[:5]], 8, stop_tokens=())[0]
    model = og.Model(str(directory))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=13, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array([IDS[:5]], np.int32))
    theirs: list[int] = []
    while not generator.is_done():
        generator.generate_next_token()
        theirs.append(int(generator.get_next_tokens()[0]))
    assert theirs == ours[: len(theirs)]
    assert theirs


def test_a_float32_base_and_bin_files_have_the_same_codes(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, dtype=torch.float32)
    directory = exact(pair, tmp_path / "out").directory
    tensors = load_file(directory / WEIGHTS)
    for name, module in quantized_by_bitsandbytes(pair.base).items():
        codes = tensors[f"{name}.weight.int8t"].reshape(module.weight.data.shape).to(torch.int16) - 128
        assert torch.equal(codes.to(torch.int8), module.weight.data)
    assert tensors["transformer.wte.weight"].dtype == torch.float32
    torch.save(load_file(pair.base / "model.safetensors"), pair.base / "pytorch_model.bin")
    (pair.base / "model.safetensors").unlink()
    again = exact(pair, tmp_path / "again").directory
    assert (again / WEIGHTS).read_bytes() == (directory / WEIGHTS).read_bytes()


REFUSED = {
    "lm_head": {"target_modules": ["lm_head"]},
    "dora": {"use_dora": True},
    "embedding": {"target_modules": ["wte"]},
}


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_what_cannot_stand_beside_is_refused_by_name_and_leaves_nothing(tmp_path: Path, kind: str) -> None:
    config = gpt2_config(tie_word_embeddings=False)
    pair = make_pair(tmp_path, config, lora=lora_config(**REFUSED[kind]))
    with pytest.raises(InputRefused, match=r"lm_head|WeightDecomposed|wte"):
        exact(pair, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_weights_without_codes_are_refused_by_name(tmp_path: Path, value: float) -> None:
    pair = make_pair(tmp_path, dtype=torch.float32)
    name = "transformer.h.1.mlp.c_fc.weight"

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[name][3, 5] = value
        return tensors

    rewrite(pair.base / "model.safetensors", spoil)
    with pytest.raises(InputRefused, match=r"h\.1\.mlp\.c_fc\.weight.*float16 cannot hold it"):
        exact(pair, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_arguments_that_do_not_belong_together_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="int8-exact"):
        export(tmp_path, precision=["int8-exact"])
    with pytest.raises(UsageError, match="int8-exact"):
        export(base=tmp_path, adapter=tmp_path, precision=["int8-exact", "int8"], out=tmp_path / "out")
    with pytest.raises(UsageError, match="no adapter"):
        export(base=tmp_path, precision=["int8-exact"], out=tmp_path / "out")
    with pytest.raises(UsageError, match="--adapters separate with --precision int8-exact"):
        export(base=tmp_path, adapter=tmp_path, adapters="separate", precision=["int8-exact"], out=tmp_path / "out")


@pytest.mark.parametrize("force", [False, True])
def test_the_bases_own_directory_is_no_output(tmp_path: Path, force: bool) -> None:
    pair = make_pair(tmp_path)
    export(pair.base)
    before = {file.name: file.read_bytes() for file in pair.base.iterdir()}
    with pytest.raises(UsageError, match="checkpoint's own directory"):
        export(base=pair.base, adapter=pair.adapter, precision=["int8-exact"], out=pair.base, force=force)
    assert {file.name: file.read_bytes() for file in pair.base.iterdir()} == before


def test_an_output_whose_weights_are_all_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes' scale of it is 0: the adapter alone speaks there, and a change of it is still seen."""
    monkeypatch.setitem(ACCURACY_LEVEL, "cpu", 1)
    pair = make_pair(tmp_path, gpt2_config(), lora=lora_config(**WIDE))
    dead = "transformer.h.0.attn.c_attn.weight"

    def kill(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[dead][:, 7] = 0
        return tensors

    rewrite(pair.base / "model.safetensors", kill)
    bundle = exact(pair, tmp_path / "out")
    weight = open_weights(bundle.directory / WEIGHTS)[dead]
    assert isinstance(weight, Quantized)
    assert not load_file(bundle.directory / WEIGHTS)[weight.scales.name][7].any()

    peft_model = peft_over_the_codes(pair)
    np.testing.assert_allclose(load(bundle, threads=1).logits(IDS), logits(peft_model), atol=1e-4, rtol=0)
    module: Any = peft_model.get_submodule("base_model.model.transformer.h.0.attn.c_attn")
    merged = module.base_layer.weight.double() + module.get_delta_weight("0").double()
    wanted, stored = merged.detach().numpy(), read_values(weight)
    assert np.abs(wanted[:, 7]).max() > 0
    assert within_step(weight, stored, wanted)
    assert within_step(weight, np.zeros_like(stored), np.zeros_like(stored))
    for changed in (stored[5, 7] + 0.01 * np.abs(wanted).max(), np.nan, np.inf):
        wrong = stored.copy()
        wrong[5, 7] = changed
        assert not within_step(weight, wrong, wanted)
