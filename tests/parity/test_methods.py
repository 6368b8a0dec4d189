"""Every adapter method through the weight gates: a right merge passes, a wrong one fails, no mutant survives."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from exporter.errors import InputRefused
from exporter.graph.export import export
from exporter.graph.weights import open_weights
from exporter.merging.merge import merge
from exporter.parity.bundles import Bundle
from exporter.parity.gates import load_thresholds
from exporter.parity.merge_mutants import merge_mutants
from exporter.parity.oracle import Oracle
from exporter.parity.verify import verify
from exporter.parity.weights import check_weights
from exporter.sources.checkpoint import open_checkpoint
from tests.pairs import edit_json, gpt2_config, save_base
from tests.parity.conftest import Made as SessionPair

pytestmark = pytest.mark.filterwarnings("ignore")

LIMITS = load_thresholds().projection
TALL = 269  # rows of a resized vocabulary


def gpt2(**changes: Any) -> GPT2Config:
    return gpt2_config(**({"n_embd": 48, "n_layer": 2} | changes))


def llama() -> LlamaConfig:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    tokens: dict[str, Any] = {
        "vocab_size": 257,
        "bos_token_id": 256,
        "eos_token_id": 256,
        "max_position_embeddings": 32,
    }
    return LlamaConfig(num_hidden_layers=2, attention_bias=True, **sizes, **tokens)


@dataclass(frozen=True)
class Case:
    """changed: ends of the names that must be judged as adapted, or the number of them."""

    adapter: PeftConfig
    changed: tuple[str, ...]
    config: Any = field(default_factory=gpt2)
    dtype: torch.dtype = torch.float16
    before: Callable[[Any], object] = lambda model: None


def lora(**options: Any) -> LoraConfig:
    values = {"r": 4, "lora_alpha": 12, "target_modules": ["c_attn", "attn.c_proj"], "fan_in_fan_out": True}
    return LoraConfig(**(values | options))


LINEAR = ["q_proj", "down_proj"]  # Llama's
ATTENTION = ("c_attn.weight", "attn.c_proj.weight")
ATTENTION_BIASES = ("c_attn.bias", "attn.c_proj.bias")
CASES = {
    "dora": Case(lora(use_dora=True), ATTENTION),
    "dora in float32": Case(lora(use_dora=True), ATTENTION, dtype=torch.float32),
    "dora in bfloat16": Case(lora(use_dora=True, use_rslora=True), ATTENTION, dtype=torch.bfloat16),
    "lora bias": Case(lora(lora_bias=True), ATTENTION + ATTENTION_BIASES),
    "bias all": Case(lora(bias="all"), (*ATTENTION, "bias")),
    "bias lora_only": Case(lora(bias="lora_only", use_rslora=True), ATTENTION + ATTENTION_BIASES),
    "embedding": Case(lora(target_modules=["wte", "c_attn"]), ("wte.weight", "c_attn.weight")),
    "dora embedding": Case(
        lora(target_modules=["wte"], use_dora=True), ("wte.weight",), gpt2(tie_word_embeddings=False)
    ),
    "head": Case(lora(target_modules=["lm_head"], fan_in_fan_out=False), ("lm_head.weight",)),
    "saved norm": Case(lora(modules_to_save=["ln_2"]), (*ATTENTION, "ln_2.weight", "ln_2.bias")),
    "saved matrix": Case(
        lora(target_modules=["c_attn"], modules_to_save=["c_fc"]), ("c_attn.weight", "c_fc.weight", "c_fc.bias")
    ),
    "saved block": Case(
        lora(target_modules=["c_attn"], modules_to_save=["h.1.mlp"]),
        ("c_attn.weight", "h.1.mlp.c_fc.weight", "h.1.mlp.c_fc.bias", "1.mlp.c_proj.weight", "1.mlp.c_proj.bias"),
    ),
    "saved head": Case(lora(modules_to_save=["lm_head"]), (*ATTENTION, "lm_head.weight")),
    "saved embedding": Case(lora(modules_to_save=["wte"]), (*ATTENTION, "wte.weight")),
    "tokens": Case(lora(trainable_token_indices=[5, 1, 256]), (*ATTENTION, "wte.weight")),
    "only tokens": Case(
        TrainableTokensConfig(token_indices=[3, 9], target_modules=["wte"]), ("wte.weight",), dtype=torch.bfloat16
    ),
    "resized": Case(
        lora(modules_to_save=["wte", "lm_head"]),
        (*ATTENTION, "wte.weight", "lm_head.weight"),
        gpt2(tie_word_embeddings=False),
        before=lambda model: model.resize_token_embeddings(TALL),
    ),
    "resized and tied": Case(
        lora(), (*ATTENTION, "wte.weight"), before=lambda model: model.resize_token_embeddings(TALL)
    ),
    "ia3": Case(  # scales the outputs, and so the bias, of all but feedforward modules
        IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]),
        ("c_attn.weight", "c_attn.bias", "mlp.c_proj.weight"),
    ),
    "vera": Case(VeraConfig(r=8, target_modules=["c_attn"]), ("c_attn.weight",)),
    "norms": Case(
        LNTuningConfig(target_modules=["ln_1", "ln_f"]), ("ln_1.weight", "ln_1.bias", "ln_f.weight", "ln_f.bias")
    ),
    "loha on the head": Case(LoHaConfig(r=4, target_modules=["lm_head"]), ("lm_head.weight",)),
    "oft": Case(
        OFTConfig(r=0, oft_block_size=8, target_modules=LINEAR), tuple(f"{n}.weight" for n in LINEAR), llama(),
        torch.float32,
    ),
    "loha": Case(
        LoHaConfig(r=4, target_modules=LINEAR), tuple(f"{n}.weight" for n in LINEAR), llama(), torch.bfloat16
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Made:
    base: Path
    adapter: Path
    merged: Path

    def oracle(self, onto: Any = "original") -> Oracle:
        return Oracle(open_checkpoint(self.base), [(self.adapter, 1.0)], onto)

    def bundle(self, change: Callable[[dict[str, torch.Tensor]], object] = lambda tensors: None) -> Bundle:
        """The merged weights, changed, as a bundle without a graph."""
        tensors = load_file(self.merged / "model.safetensors")
        change(tensors)
        path = self.merged / "changed.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        return Bundle(self.merged, self.merged / "model.onnx", "float", "cpu", "known", {}, open_weights(path))


def write_random_adapter(
    directory: Path, base: Path, config: PeftConfig, before: Callable[[Any], object], scale: float = 0.1
) -> None:
    """Every tensor that PEFT would train is moved away from where it begins."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before(model)
    with warnings.catch_warnings(action="ignore"):
        peft: Any = get_peft_model(model, config)
        with torch.no_grad():
            for parameter in peft.parameters():
                if parameter.requires_grad:
                    parameter += torch.randn_like(parameter) * scale
        peft.save_pretrained(str(directory))


def make(directory: Path, case: Case, **options: Any) -> Made:
    made = Made(directory / "base", directory / "adapter", directory / "merged")
    save_base(made.base, case.config, case.dtype)
    write_random_adapter(made.adapter, made.base, case.adapter, case.before)
    merge(base=made.base, adapter=made.adapter, out=made.merged, **options)
    return made


def outcomes(bundle: Bundle, oracle: Oracle) -> dict[str, str]:
    return {gate.gate: gate.outcome for gate in check_weights(bundle, oracle, LIMITS).gates}


@pytest.mark.parametrize("name", CASES)
def test_a_right_merge_passes_and_a_wrong_one_fails(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    made = make(tmp_path, case)
    oracle = made.oracle()
    oracle.require_change()
    state = set(load_file(made.merged / "model.safetensors"))
    wanted = {oracle.canonical(one) for one in state for end in case.changed if f".{one}".endswith(f".{end}")}
    assert set(oracle.names) == wanted
    assert set(outcomes(made.bundle(), oracle).values()) == {"PASS"}
    for mutant in merge_mutants(made.bundle(), oracle, LIMITS):
        assert mutant.outcome != "survived", mutant
        assert mutant.outcome == "killed" or mutant.name not in ("adapter dropped", "scale x 0.9"), mutant

    full = {oracle.canonical(one): one for one in state}
    for target in oracle.names:
        adapted = oracle.merge(target)
        if not adapted.delta.any():
            continue
        for factor in (0.0, 0.9):
            wrong = torch.from_numpy(adapted.original + factor * adapted.delta).to(case.dtype)

            def put(tensors: dict[str, torch.Tensor], one: str = full[target], value: torch.Tensor = wrong) -> None:
                tensors[one] = value

            assert outcomes(made.bundle(put), oracle)["weights.elements"] == "FAIL", (target, factor)


def test_a_replaced_row_that_is_reverted_or_an_untouched_one_that_is_changed_fails(tmp_path: Path) -> None:
    made = make(tmp_path, CASES["tokens"])
    oracle = made.oracle()
    base = load_file(made.base / "model.safetensors")["transformer.wte.weight"]

    def revert(tensors: dict[str, torch.Tensor]) -> None:
        tensors["transformer.wte.weight"][5] = base[5]

    def spill(tensors: dict[str, torch.Tensor]) -> None:
        tensors["transformer.wte.weight"][6, 0] += 0.01

    assert outcomes(made.bundle(revert), oracle)["weights.elements"] == "FAIL"
    assert outcomes(made.bundle(spill), oracle)["weights.elements"] == "FAIL"
    mutants = {mutant.name: mutant for mutant in merge_mutants(made.bundle(), oracle, LIMITS)}
    assert mutants["one replaced row reverted"].killed_by == ("weights.elements",)


def test_dora_merged_as_plain_lora_is_killed(tmp_path: Path) -> None:
    made = make(tmp_path, CASES["dora"])
    mutants = {mutant.name: mutant for mutant in merge_mutants(made.bundle(), made.oracle(), LIMITS)}
    assert mutants["magnitude left out"].outcome == "killed"
    assert "weights.elements" in mutants["magnitude left out"].killed_by


def test_a_tied_head_that_was_not_parted_is_missing(tmp_path: Path) -> None:
    made = make(tmp_path, CASES["head"])
    oracle = made.oracle()
    assert oracle.untied == {"lm_head.weight"}
    with pytest.raises(InputRefused, match=r"no tensor 'lm_head\.weight'"):
        check_weights(made.bundle(lambda tensors: tensors.pop("lm_head.weight")), oracle, LIMITS)
    made = make(tmp_path / "embedding", CASES["embedding"])
    gates = outcomes(made.bundle(lambda tensors: tensors.pop("lm_head.weight")), made.oracle())
    assert gates["weights.names"] == "FAIL"  # the head keeps the base's values, in a tensor of its own


@pytest.mark.parametrize("name", ["dora", "bias all", "loha", "ia3"])
def test_the_oracle_is_pefts_own_merge(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    made = make(tmp_path, case)
    model: Any = AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, str(made.adapter)).merge_and_unload().state_dict()
    oracle = made.oracle()
    for found in oracle.adapted():
        wanted = merged[oracle.prefix + found.name].double().numpy()
        assert np.abs(found.merged - wanted).max() < 1e-6
        assert found.slack.max() < 1e-6 * np.abs(wanted).max() + 1e-6  # a bound that is wide would prove nothing


def test_an_adapter_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    made = make(tmp_path, CASES["ia3"])
    tensors = load_file(made.adapter / "adapter_model.safetensors")
    save_file({k: torch.ones_like(v) for k, v in tensors.items()}, made.adapter / "adapter_model.safetensors")
    with pytest.raises(InputRefused, match="changes nothing"):
        made.oracle().require_change()


def test_what_cannot_be_judged_is_refused_by_name(tmp_path: Path) -> None:
    made = make(tmp_path, CASES["dora"])
    base = open_checkpoint(made.base)
    with pytest.raises(InputRefused, match="more than plain LoRA, weighted"):
        Oracle(base, [(made.adapter, 0.5)])
    with pytest.raises(InputRefused, match="beside another adapter"):
        Oracle(base, [(made.adapter, 1.0), (made.adapter, 1.0)])
    edit_json(made.adapter / "adapter_config.json", peft_type="XLORA")
    with pytest.raises(InputRefused, match="XLORA"):
        Oracle(base, [(made.adapter, 1.0)])
    edit_json(made.adapter / "adapter_config.json", peft_type="LORA", target_parameters=["c_attn.weight"])
    with pytest.raises(InputRefused, match="target_parameters"):
        Oracle(base, [(made.adapter, 1.0)])


@pytest.mark.parametrize("name", ["saved norm", "ia3"])
def test_a_missing_tensor_of_the_adapter_is_refused(tmp_path: Path, name: str) -> None:
    made = make(tmp_path, CASES[name])
    tensors = load_file(made.adapter / "adapter_model.safetensors")
    tensors.pop(next(key for key in tensors if "ln_2" in key or "ia3" in key))
    save_file(tensors, made.adapter / "adapter_model.safetensors")
    with pytest.raises(InputRefused, match=r"1 adapter tensor|does not fit"):
        assert made.oracle().names


@pytest.mark.parametrize(
    "adapter",
    [
        lora(use_dora=True),
        IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]),
    ],
    ids=["dora", "ia3"],
)
def test_verify_passes_a_right_4_bit_bundle(made: SessionPair, tmp_path: Path, adapter: Any) -> None:
    """With the 8-bit reference: PEFT's DoRA and IA3 stop in bitsandbytes' layers unless they are mended."""
    write_random_adapter(tmp_path / "adapter", made.base, adapter, lambda model: None, scale=0.05)
    merge(base=made.base, adapter=tmp_path / "adapter", out=tmp_path / "merged", template="alpaca")
    (bundle,) = export(tmp_path / "merged", precision=["int4"])
    found = verify(base=made.base, adapter=tmp_path / "adapter", bundle=bundle.directory, prompts=made.prompts)
    assert found.verdict == "PASS", found.summary
