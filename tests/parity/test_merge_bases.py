"""Which base to merge onto: every figure, against models that are loaded, run and compared here without the project."""

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from scipy.special import log_softmax, rel_entr
from transformers import AutoModelForCausalLM

from exporter.parity import merge_bases
from exporter.parity.bundle_check import Run
from exporter.parity.int8_base import Onto
from exporter.parity.merge_bases import codes_errors, compare_merge_bases
from exporter.parity.oracle import Oracle
from exporter.parity.result import MergeBase, MergeBases
from exporter.sources.checkpoint import open_checkpoint
from tests.bitsandbytes_model import int8_layers, load_in_8_bits
from tests.parity.conftest import Made, score_pair
from tests.parity.test_methods import write_random_adapter

pytestmark = pytest.mark.filterwarnings("ignore")

SCALING = 16 / 4  # lora_alpha / r of the session's adapter
Float = NDArray[np.float64]


def code_values(base: Path) -> dict[str, torch.Tensor]:
    """What bitsandbytes' codes mean, as Conv1D stores it: each weight that 8-bit loading converts."""
    layers = int8_layers(load_in_8_bits(base))
    return {f"{name}.weight": (one.weight.CB.float() * one.weight.SCB[:, None] / 127).T for name, one in layers.items()}


def fp32_model(base: Path, values: dict[str, torch.Tensor]) -> Any:
    """transformers' model in float32, with `values` in the place of some weights."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.load_state_dict(model.state_dict() | values)
    return model


def log_probabilities(model: Any, run: Run) -> Float:
    """(N, V): of every scored token, one unpadded document a call."""
    with torch.inference_mode():
        logits = [
            model.eval()(torch.tensor([one.tokens])).logits[0, one.positions].double().numpy() for one in run.documents
        ]
    return log_softmax(np.concatenate(logits), axis=1)


def mean_kl(log_p: Float, log_q: Float) -> float:
    return float(rel_entr(np.exp(log_p), np.exp(log_q)).sum(axis=1).mean())


@dataclass(frozen=True, slots=True)
class Models:
    """Log-probabilities of the 8-bit reference R, and of both bases with the adapter beside them and merged."""

    reference: Float
    truth: Float
    merged: Float
    codes: Float
    codes_merged: Float


@pytest.fixture(scope="module")
def models(made: Made, scored: Run) -> Models:
    def run(model: Any) -> tuple[Any, Float]:
        adapted = PeftModel.from_pretrained(model, str(made.adapter))
        return adapted, log_probabilities(adapted, scored)

    def unmerged_and_merged(values: dict[str, torch.Tensor]) -> tuple[Float, Float]:
        adapted, unmerged = run(fp32_model(made.base, values))
        return unmerged, log_probabilities(adapted.merge_and_unload(), scored)

    _, reference = run(load_in_8_bits(made.base))
    return Models(reference, *unmerged_and_merged({}), *unmerged_and_merged(code_values(made.base)))


@pytest.fixture(scope="module", params=["original", "int8"])
def found(
    request: pytest.FixtureRequest, made: Made, scored: Run, tmp_path_factory: pytest.TempPathFactory
) -> MergeBases:
    """The comparison in a run whose bundles were merged onto either base."""
    onto: Onto = request.param
    run = scored if onto == "original" else score_pair(made, tmp_path_factory.mktemp("codes"), onto)
    return compare(run)


def compare(run: Run) -> MergeBases:
    return compare_merge_bases(run.pair, run.oracle, run.store, run.reference, run.common.merge, run.level, run.memory)


def test_each_distance_is_the_kl_of_the_models_that_it_names(found: MergeBases, models: Models) -> None:
    original, int8 = found.bases
    assert (original.onto, int8.onto) == ("original", "int8")
    expected = {
        "R to original": mean_kl(models.reference, models.merged),
        "R to int8": mean_kl(models.reference, models.codes_merged),
        "T to original": mean_kl(models.truth, models.merged),
        "T to int8": mean_kl(models.truth, models.codes_merged),
    }
    values = sorted(expected.values())
    assert all(b > 1.02 * a for a, b in pairwise(values)), "exchanged columns would not be seen"
    reported = {
        "R to original": original.to_reference,
        "R to int8": int8.to_reference,
        "T to original": original.to_truth,
        "T to int8": int8.to_truth,
    }
    assert reported == pytest.approx(expected, rel=2e-3, abs=1e-9)


def bounds(base: MergeBase) -> list[tuple[float | None, float | None, float | None]]:
    return [
        (base.to_reference_lower, base.to_reference, base.to_reference_upper),
        (base.to_truth_lower, base.to_truth, base.to_truth_upper),
    ]


def test_each_distance_stands_between_its_bounds(found: MergeBases) -> None:
    for base in found.bases:
        for lower, estimate, upper in bounds(base):
            assert lower is not None
            assert estimate is not None
            assert upper is not None
            assert lower < estimate < upper < 2 * estimate or estimate < 1e-9


def test_the_ladder_parts_what_8_bits_do_to_weights_and_to_activations(found: MergeBases, models: Models) -> None:
    weights, activations = found.stages
    assert [weights.step, activations.step] == ["T -> D", "D -> R"]
    assert [weights.kl, activations.kl] == pytest.approx(
        [mean_kl(models.truth, models.codes), mean_kl(models.codes, models.reference)], rel=2e-3
    )
    p, whole = np.exp(models.truth), models.reference - models.truth
    whole = whole - (p * whole).sum(axis=1, keepdims=True)
    covariance = [(p * whole * step).sum() for step in (models.codes - models.truth, models.reference - models.codes)]
    assert [weights.share, activations.share] == pytest.approx([one / sum(covariance) for one in covariance], rel=2e-3)


def test_the_codes_error_of_each_layer_is_that_of_bitsandbytes_codes(made: Made, found: MergeBases) -> None:
    stored, values = load_file(made.base / "model.safetensors"), code_values(made.base)
    factors = load_file(made.adapter / "adapter_model.safetensors")
    assert [one.tensor for one in found.tensors] == [f"h.{layer}.attn.c_attn.weight" for layer in range(3)]
    for one in found.tensors:
        name = f"transformer.{one.tensor}"
        module = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (factors[f"{module}.lora_{kind}.weight"].double().numpy() for kind in "AB")
        weight = stored[name].double().numpy()
        q = np.linalg.norm(weight - values[name].double().numpy())
        assert one.to_weight == pytest.approx(q / np.linalg.norm(weight), rel=1e-5)
        assert one.to_delta == pytest.approx(q / np.linalg.norm(SCALING * (b @ a)), rel=1e-5)


def test_a_weight_that_8_bit_loading_leaves_alone_has_no_codes_error(made: Made, tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["lm_head", "mlp.c_fc"])
    write_random_adapter(tmp_path / "adapter", made.base, lora, lambda model: None)
    oracle = Oracle(open_checkpoint(made.base), [(tmp_path / "adapter", 1.0)])
    assert "lm_head.weight" in oracle.names
    assert [one.tensor for one in codes_errors(oracle)] == [f"h.{layer}.mlp.c_fc.weight" for layer in range(3)]


def test_at_commit_a_large_pair_is_told_the_codes_errors_alone(scored: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_bases, "CHEAP", 0)
    assert compare(scored) == MergeBases((), codes_errors(scored.oracle))
    assert len(compare(replace(scored, level="nightly")).bases) == 2
