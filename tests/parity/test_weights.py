"""Weight gates against PEFT: one wrong element, one wrong layer, one flipped bit of the rest are seen."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from exporter.errors import InputRefused
from exporter.graph.export import export
from exporter.merging.merge import merge
from exporter.parity.elements import beyond, elements_pass, round_to
from exporter.parity.gates import load_thresholds
from exporter.parity.merge_mutants import merge_mutants
from exporter.parity.oracle import Adapted, Oracle
from exporter.parity.projection import judge_projection, project
from exporter.parity.weights import check_weights
from exporter.sources.checkpoint import open_checkpoint
from tests.parity.conftest import Made, open_bundle, replace_tensors, write_adapter, write_base

LIMITS = load_thresholds().projection


@pytest.fixture(scope="module")
def oracle(made: Made) -> Oracle:
    return Oracle(open_checkpoint(made.base), [(made.adapter, 1.0)])


@pytest.fixture(scope="module")
def adapted(oracle: Oracle) -> Adapted:
    return oracle.merge("h.1.attn.c_attn.weight")


def peft_merged(base: Path, adapters: list[Path], weights: list[float]) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    state = {name: value.clone().double() for name, value in model.state_dict().items()}
    for adapter, weight in zip(adapters, weights, strict=True):
        fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        before = {name: value.clone().double() for name, value in fresh.state_dict().items()}
        merged = PeftModel.from_pretrained(fresh, str(adapter)).merge_and_unload().state_dict()
        state = {name: state[name] + weight * (merged[name].double() - before[name]) for name in state}
    return state


def test_the_oracle_is_pefts_merge_with_every_bit_that_float64_adds(made: Made, oracle: Oracle) -> None:
    expected = peft_merged(made.base, [made.adapter], [1.0])
    assert oracle.names == [f"h.{i}.attn.c_attn.weight" for i in range(3)]
    for found in oracle.adapted():
        np.testing.assert_allclose(found.merged, expected[f"transformer.{found.name}"].numpy(), atol=2e-7)
        assert np.abs(found.delta).max() > 1e-2
        assert (found.ranks, found.scalings, found.alphas) == ((4,), (4.0,), (16.0,))


def test_several_adapters_add_up_with_their_weights(made: Made, tmp_path: Path) -> None:
    model = GPT2LMHeadModel.from_pretrained(made.base, dtype=torch.float32)
    write_adapter(tmp_path / "second", model, r=2, seed=9)
    both = Oracle(open_checkpoint(made.base), [(made.adapter, 0.25), (tmp_path / "second", -1.5)])
    expected = peft_merged(made.base, [made.adapter, tmp_path / "second"], [0.25, -1.5])
    for found in both.adapted():
        np.testing.assert_allclose(found.merged, expected[f"transformer.{found.name}"].numpy(), atol=1e-6)


def test_an_adapter_of_another_base_is_refused(made: Made, tmp_path: Path) -> None:
    write_base(tmp_path / "other", layers=2)
    with pytest.raises(InputRefused):
        Oracle(open_checkpoint(tmp_path / "other"), [(made.adapter, 1.0)])


def wrong_elements(stored: np.ndarray, adapted: Adapted, dtype: str) -> int:
    """How many lie outside the bound; the gate fails where one does."""
    wrong = int((~(beyond(stored, adapted, (dtype,), slice(None)) <= 0)).sum())
    assert elements_pass(stored.__getitem__, adapted, [(dtype,)]) == (wrong == 0)
    return wrong


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_pefts_merge_rounded_once_passes_and_one_ulp_fails(adapted: Adapted, dtype: str) -> None:
    stored = round_to(adapted.merged, dtype)
    assert wrong_elements(stored, adapted, dtype) == 0
    target = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[dtype]
    wrong = torch.from_numpy(stored).to(target)
    place = np.unravel_index(np.abs(stored).argmax(), stored.shape)
    bits = wrong.view(torch.int32 if dtype == "F32" else torch.int16)
    bits[place] ^= 1  # the lowest bit
    assert wrong_elements(wrong.double().numpy(), adapted, dtype) == 1


def test_rounding_the_delta_first_is_not_one_rounding(adapted: Adapted) -> None:
    """PEFT's safe_merge rounds the delta before adding it: many float16 elements are then wrong."""
    twice = round_to(adapted.original + round_to(adapted.delta, "F16"), "F16")
    assert wrong_elements(twice, adapted, "F16") > 10


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_a_wrong_element_and_no_projection(value: float, adapted: Adapted) -> None:
    stored = round_to(adapted.merged, "F16")
    stored[0, 0] = value
    assert wrong_elements(stored, adapted, "F16") == 1
    assert judge_projection(project(stored.__getitem__, adapted), LIMITS) == "FAIL"


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.9, 1.1, 2.0])
def test_the_projection_is_the_factor_of_the_adapter(adapted: Adapted, factor: float) -> None:
    found = project((adapted.original + factor * adapted.delta).__getitem__, adapted)
    assert found.share == pytest.approx(factor, abs=1e-9)
    assert judge_projection(found, LIMITS) == "FAIL"


def test_noise_widens_the_projection_until_nothing_can_be_said(adapted: Adapted) -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, adapted.merged.shape)
    size = np.linalg.norm(adapted.delta)
    small = project((adapted.merged + 0.001 * size * noise).__getitem__, adapted)
    assert small.error == pytest.approx(0.001, rel=0.05)
    assert judge_projection(small, LIMITS) == "PASS"
    assert (
        judge_projection(project((adapted.merged + 0.2 * size * noise).__getitem__, adapted), LIMITS) == "INCONCLUSIVE"
    )
    silent = replace(adapted, merged=adapted.original)
    assert judge_projection(project(adapted.original.__getitem__, silent), LIMITS) == "INCONCLUSIVE"


@pytest.mark.parametrize("kind", ["merged", "int8", "int4"])
def test_true_bundles_pass_and_every_merge_mutant_dies(made: Made, oracle: Oracle, kind: str) -> None:
    bundle = open_bundle(getattr(made, kind))
    checks = check_weights(bundle, oracle, LIMITS)
    gates, projections = checks.gates, checks.projections
    assert checks.faults == []
    assert {gate.outcome for gate in gates} == {"PASS"}
    expected = {"weights.untouched", "weights.projection", "weights.names"}
    assert {gate.gate for gate in gates} == expected | ({"weights.elements"} if kind == "merged" else {"weights.step"})
    assert len(projections) == 3
    mutants = {mutant.name: mutant for mutant in merge_mutants(bundle, oracle, LIMITS)}
    assert len(mutants) == 10
    assert [name for name, mutant in mutants.items() if mutant.outcome == "survived"] == []
    assert [name for name, mutant in mutants.items() if mutant.outcome == "not applicable"] == ["transposed"]
    for mutant in mutants.values():
        if mutant.outcome == "killed":
            assert "weights.projection" in mutant.killed_by


def test_a_mutant_that_equals_the_original_is_not_applicable_with_its_proof(tmp_path: Path) -> None:
    model = write_base(tmp_path / "base", layers=1)
    write_adapter(tmp_path / "adapter", model, r=1)
    merge(base=tmp_path / "base", adapter=tmp_path / "adapter", out=tmp_path / "merged", template="alpaca")
    export(tmp_path / "merged")
    oracle = Oracle(open_checkpoint(tmp_path / "base"), [(tmp_path / "adapter", 1.0)])
    mutants = {m.name: m for m in merge_mutants(open_bundle(tmp_path / "merged"), oracle, LIMITS)}
    assert mutants["alpha instead of alpha / r"].detail == "alpha / r = alpha: r = 1"
    assert mutants["layers shuffled"].detail == "one target: nothing to shuffle with"
    assert mutants["adapter dropped"].outcome == "killed"


def rewrite(directory: Path, change) -> None:
    """Change tensors of model.safetensors in place, keeping header and offsets, and take the manifest away."""
    path = directory / "model.safetensors"
    before = path.read_bytes()
    start = 8 + int.from_bytes(before[:8], "little")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, directory / "changed.safetensors")
    (directory / "changed.safetensors").unlink()
    from exporter.sources.safetensors_file import read_header

    data = bytearray(before)
    for name, info in read_header(path)[0].items():
        data[info.offset : info.offset + info.nbytes] = tensors[name].contiguous().view(torch.uint8).numpy().tobytes()
    assert data[:start] == before[:start]
    path.write_bytes(data)
    (directory / "exporter.json").unlink()


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(made.merged, tmp_path / "merged"))


def outcomes(directory: Path, oracle: Oracle) -> dict[str, tuple[str, str]]:
    gates = check_weights(open_bundle(directory), oracle, LIMITS).gates
    return {gate.gate: (gate.outcome, gate.detail) for gate in gates}


def test_without_a_manifest_a_flipped_bit_is_still_seen(copy: Path, oracle: Oracle) -> None:
    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors["transformer.h.2.mlp.c_fc.weight"].view(torch.int16)[3, 3] ^= 1

    rewrite(copy, flip)
    outcome, detail = outcomes(copy, oracle)["weights.untouched"]
    assert outcome == "FAIL"
    assert "h.2.mlp.c_fc.weight" in detail


def test_two_swapped_layers_are_named(copy: Path, oracle: Oracle) -> None:
    def swap(tensors: dict[str, torch.Tensor]) -> None:
        a, b = "transformer.h.0.attn.c_attn.weight", "transformer.h.1.attn.c_attn.weight"
        tensors[a], tensors[b] = tensors[b].clone(), tensors[a].clone()

    rewrite(copy, swap)
    found = outcomes(copy, oracle)
    assert found["weights.elements"][0] == "FAIL"
    assert "h.0.attn" in found["weights.elements"][1]
    assert "h.1.attn" in found["weights.elements"][1]
    assert "h.2.attn" not in found["weights.elements"][1]


def test_an_unmerged_layer_is_named(made: Made, copy: Path, oracle: Oracle) -> None:
    name = "transformer.h.1.attn.c_attn.weight"
    original = load_file(made.base / "model.safetensors")[name]
    rewrite(copy, lambda tensors: tensors.update({name: original}))
    outcome, detail = outcomes(copy, oracle)["weights.projection"]
    assert outcome == "FAIL"
    assert "share 0.0000" in detail
    assert "h.1.attn.c_attn.weight" in detail


ROUNDINGS = [
    (torch.bfloat16, "auto", "fp16"),
    (torch.float32, "float16", "fp32"),
    (torch.float32, "bfloat16", "fp32"),
    (torch.bfloat16, "float16", "fp32"),
    (torch.float16, "auto", "fp32"),
]


@pytest.mark.parametrize(("stored", "merged_as", "precision"), ROUNDINGS, ids=str)
def test_a_bundle_may_be_rounded_to_the_merges_type_and_then_to_its_own(
    tmp_path: Path, stored: torch.dtype, merged_as: str, precision: str
) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = write_base(base)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(stored)
    model.save_pretrained(base)
    write_adapter(adapter, model)
    merge(base=base, adapter=adapter, out=tmp_path / "merged", dtype=merged_as, template="alpaca")
    bundle = open_bundle(export(tmp_path / "merged", precision=[precision])[0].directory)
    oracle = Oracle(open_checkpoint(base), [(adapter, 1.0)])
    assert {gate.gate: gate.outcome for gate in check_weights(bundle, oracle, LIMITS).gates} == {
        f"weights.{name}": "PASS" for name in ("elements", "untouched", "projection", "names")
    }
    mutants = merge_mutants(bundle, oracle, LIMITS)
    assert {mutant.name for mutant in mutants if mutant.outcome != "killed"} == {"transposed"}


def test_a_third_rounding_is_not_allowed(made: Made, oracle: Oracle, tmp_path: Path) -> None:
    """fp32 values that went through bfloat16, though base and merge are float16."""
    (bundle,) = export(made.merged, precision=["fp32"], out=tmp_path)
    tensors = load_file(bundle.directory / "weights.safetensors")
    name = next(name for name in tensors if "h.1.attn.c_attn.weight" in name)
    replace_tensors(bundle.directory, "weights.safetensors", {name: tensors[name].bfloat16().float()})
    gates = {gate.gate: gate for gate in check_weights(open_bundle(bundle.directory), oracle, LIMITS).gates}
    assert gates["weights.elements"].outcome == "FAIL"


@pytest.mark.parametrize("precision", ["native", "int8"])
def test_a_target_that_training_left_at_zero_is_judged_by_its_elements(tmp_path: Path, precision: str) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write_adapter(adapter, write_base(base))
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in tensors:
        if ".h.1." in name and "lora_B" in name:
            tensors[name].zero_()
    save_file(tensors, adapter / "adapter_model.safetensors")
    merge(base=base, adapter=adapter, out=tmp_path / "merged", template="alpaca")
    bundle = open_bundle(export(tmp_path / "merged", precision=[precision])[0].directory)
    oracle = Oracle(open_checkpoint(base), [(adapter, 1.0)])
    checks = check_weights(bundle, oracle, LIMITS)
    assert {gate.outcome for gate in checks.gates} == {"PASS"}
    assert len(checks.projections) == 2
    mutants = {mutant.name: mutant.outcome for mutant in merge_mutants(bundle, oracle, LIMITS)}
    assert "survived" not in mutants.values()
    assert mutants["layers shuffled"] == "killed"
