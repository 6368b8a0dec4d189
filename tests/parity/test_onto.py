"""A merge onto the base's int8 codes: the truth is fp32 over what they mean, and the wrong base is seen."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from exporter.errors import InputRefused
from exporter.graph.export import export
from exporter.merging.merge import merge
from exporter.parity import int8_base
from exporter.parity.bases import BaseOptions, load_base, meta_model
from exporter.parity.bundles import Bundle, merged_onto
from exporter.parity.gates import load_thresholds
from exporter.parity.int8_base import int8_modules, int8_values
from exporter.parity.merge_mutants import merge_mutants
from exporter.parity.oracle import Oracle
from exporter.parity.verify import verify
from exporter.parity.weights import check_weights
from exporter.sources.checkpoint import open_checkpoint
from tests.parity.conftest import Made, open_bundle
from tests.parity.test_methods import Case, lora, make

pytestmark = pytest.mark.filterwarnings("ignore")

LIMITS = load_thresholds().projection


@dataclass(frozen=True)
class Onto:
    """The session's pair merged onto its int8 codes, with a native, an 8-bit and a 4-bit bundle."""

    made: Made
    merged: Path
    int8: Path
    int4: Path

    def oracle(self, onto: Any = "int8") -> Oracle:
        return Oracle(open_checkpoint(self.made.base), [(self.made.adapter, 1.0)], onto)


@pytest.fixture(scope="module")
def onto(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Onto:
    root = tmp_path_factory.mktemp("onto")
    merge(base=made.base, adapter=made.adapter, out=root / "merged", onto="int8", template="alpaca")
    native, int8, int4 = (bundle.directory for bundle in export(root / "merged", precision=("native", "int8", "int4")))
    return Onto(made, native, int8, int4)


@pytest.fixture(scope="module")
def oracle(onto: Onto) -> Oracle:
    return onto.oracle()


def outcomes(bundle: Bundle, oracle: Oracle) -> dict[str, str]:
    return {gate.gate: gate.outcome for gate in check_weights(bundle, oracle, LIMITS).gates}


def test_the_codes_are_those_of_the_loaded_8_bit_model(made: Made) -> None:
    quantization = BitsAndBytesConfig(load_in_8bit=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        made.base, quantization_config=quantization, dtype=torch.float16, device_map={"": "cpu"}
    )
    loaded = {name: module for name, module in model.named_modules() if type(module).__name__ == "Linear8bitLt"}
    modules = int8_modules(meta_model(made.base))
    assert list(modules) == list(loaded)
    values = load_base(made.base, BaseOptions("int8"))
    for name, module in loaded.items():
        codes, scales = module.weight.CB.float(), module.weight.SCB.float()
        wanted = (codes * scales[:, None] / 127).T  # Conv1D stores the transpose
        np.testing.assert_allclose(values.get_submodule(name).weight.detach(), wanted.detach(), rtol=3e-7)


def test_without_bitsandbytes_the_values_are_the_same(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(64, 96).half()
    modules = int8_modules(meta_model(made.base))
    values = [int8_values(weight, transposed=transposed, name="w") for transposed in (True, False)]
    monkeypatch.setattr(int8_base, "has_bitsandbytes", lambda: False)
    assert int8_modules(meta_model(made.base)) == modules
    for transposed, value in zip((True, False), values, strict=True):
        assert torch.equal(int8_values(weight, transposed=transposed, name="w"), value)
    with pytest.raises(InputRefused, match="float16 cannot hold"):
        int8_values(torch.full((2, 2), 1e6), transposed=False, name="w")


@pytest.mark.parametrize("kind", ["merged", "int8", "int4"])
def test_true_bundles_pass_and_the_wrong_base_is_killed(onto: Onto, oracle: Oracle, kind: str) -> None:
    bundle = open_bundle(getattr(onto, kind))
    assert bundle.onto == "int8"
    assert set(outcomes(bundle, oracle).values()) == {"PASS"}
    mutants = {mutant.name: mutant for mutant in merge_mutants(bundle, oracle, LIMITS)}
    assert [name for name, mutant in mutants.items() if mutant.outcome == "survived"] == []
    killed = mutants["merged onto the original base"].killed_by
    assert killed == (
        ("weights.elements", "weights.untouched", "weights.onto") if kind == "merged" else ("weights.onto",)
    )


@pytest.mark.parametrize("kind", ["merged", "int8", "int4"])
def test_the_other_base_fails_both_ways(onto: Onto, oracle: Oracle, kind: str) -> None:
    original = outcomes(open_bundle(getattr(onto.made, kind)), oracle)
    assert original["weights.onto"] == "FAIL"
    codes = outcomes(open_bundle(getattr(onto, kind)), onto.oracle("original"))
    if kind == "merged":
        assert (original["weights.elements"], original["weights.untouched"]) == ("FAIL", "FAIL")
        assert (codes["weights.elements"], codes["weights.untouched"]) == ("FAIL", "FAIL")
    assert "weights.onto" not in codes


@pytest.mark.parametrize(
    "adapter",
    [
        lora(use_dora=True),
        lora(target_modules=["c_attn"], modules_to_save=["c_fc"], bias="all", trainable_token_indices=[2]),
        LoraConfig(r=2, target_modules=["lm_head"]),
    ],
    ids=["dora", "saved, bias and tokens", "head"],
)
def test_other_adapters_onto_int8(tmp_path: Path, adapter: Any) -> None:
    pair = make(tmp_path, Case(adapter, ()), onto="int8")
    oracle = pair.oracle("int8")
    bundle = pair.bundle()
    assert set(outcomes(bundle, oracle).values()) == {"PASS"}
    mutants = {mutant.name: mutant for mutant in merge_mutants(bundle, oracle, LIMITS)}
    assert [mutant for mutant in mutants.values() if mutant.outcome == "survived"] == []
    assert "weights.onto" in mutants["merged onto the original base"].killed_by
    base = load_file(pair.base / "model.safetensors")["transformer.h.0.mlp.c_proj.weight"]

    def put(tensors: dict[str, torch.Tensor]) -> None:
        tensors["transformer.h.0.mlp.c_proj.weight"] = base

    assert outcomes(pair.bundle(put), oracle)["weights.untouched"] == "FAIL"


def test_verify_says_what_it_was_merged_onto(onto: Onto) -> None:
    made = onto.made
    found = verify(base=made.base, adapter=made.adapter, bundle=[onto.merged, onto.int4], prompts=made.prompts)
    assert found.verdict == "PASS", found.summary
    assert json.loads(found.to_json())["inputs"]["onto"] == "int8"
    (stage,) = [stage for stage in found.bundles[0].stages if stage.step == "T -> M32"]
    assert (stage.kl or 0) < 1e-9  # T is D: the truth stands on the codes, as the merge does


def test_bundles_of_different_bases_are_refused_together(onto: Onto) -> None:
    made = onto.made
    with pytest.raises(InputRefused, match=r"different bases.*int8"):
        verify(base=made.base, adapter=made.adapter, bundle=[made.merged, onto.merged], prompts=made.prompts)


def test_an_unknown_onto_is_refused(onto: Onto, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(onto.merged, tmp_path / "merged"))
    manifest = json.loads((directory / "exporter.json").read_text())
    manifest["stages"]["merge"]["request"]["onto"] = "int3"
    (directory / "exporter.json").write_text(json.dumps(manifest))
    with pytest.raises(InputRefused, match="int3"):
        merged_onto(directory)


def test_a_manifest_that_names_the_wrong_base_fails(onto: Onto, oracle: Oracle, tmp_path: Path) -> None:
    """Merged onto the original, and the manifest says int8: the weights are believed, not the manifest."""
    directory = Path(shutil.copytree(onto.made.merged, tmp_path / "merged"))
    manifest = json.loads((directory / "exporter.json").read_text())
    manifest["stages"]["merge"]["request"]["onto"] = "int8"
    (directory / "exporter.json").write_text(json.dumps(manifest))
    bundle = open_bundle(directory)
    assert bundle.onto == "int8"
    assert {"weights.onto", "weights.elements", "weights.untouched"} <= {
        gate for gate, outcome in outcomes(bundle, oracle).items() if outcome == "FAIL"
    }


def test_one_tensor_on_the_wrong_base_fails(onto: Onto, oracle: Oracle, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(onto.merged, tmp_path / "merged"))
    name = "transformer.h.1.mlp.c_fc.weight"
    tensors = load_file(directory / "model.safetensors")
    tensors[name] = load_file(onto.made.base / "model.safetensors")[name]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "exporter.json").unlink()
    export(directory, force=True)
    gates = check_weights(open_bundle(directory), oracle, LIMITS).gates
    (untouched,) = [gate for gate in gates if gate.gate == "weights.untouched"]
    assert untouched.outcome == "FAIL"
    assert "h.1.mlp.c_fc.weight" in untouched.detail
