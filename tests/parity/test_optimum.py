"""`verify` on bundles that optimum traced: the same gates and mutants as on our own graphs, or a reason why not."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig, OPTConfig, Qwen2Config

from exporter import export, merge, verify
from exporter.errors import InputRefused
from exporter.graph.optimum_weights import TRANSPOSED
from exporter.parity.bundle_check import Run, verify_bundle
from exporter.parity.gates import load_thresholds
from exporter.parity.weights import check_weights
from tests.graph.test_optimum_weights import after_tracing
from tests.parity.conftest import (
    PROMPTS,
    VOCABULARY,
    Made,
    open_bundle,
    replace_tensors,
    score_pair,
    update_manifest,
    write_tokenizer,
)
from tests.parity.test_methods import write_random_adapter

pytest.importorskip("optimum.exporters.onnx", reason="optimum's ONNX part is not installed", exc_type=ImportError)
pytestmark = pytest.mark.filterwarnings("ignore")

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
GROUPED: dict[str, Any] = {"intermediate_size": 128, "num_key_value_heads": 2}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES, **GROUPED),
    "qwen2": Qwen2Config(**SIZES, **GROUPED, tie_word_embeddings=True),
    "opt": OPTConfig(**SIZES, ffn_dim=128, word_embed_proj_dim=64),
    "bloom": BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4),
}
PACKED = {"q, k, v out of order"}  # no graph of optimum packs q, k, v
NOT_APPLICABLE = {
    "llama": PACKED | {"q, k, v swapped"},
    "qwen2": PACKED | {"q, k, v swapped"},
    "opt": PACKED | {"q, k, v swapped"},
    "bloom": PACKED | {"transposed", "positions + 1"},  # a packed matrix, and ALiBi in the place of positions
}
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def make_pair(root: Path, kind: str) -> Made:
    """base, adapter and merged in `root`, and optimum's bundle of it, as `merged` of what is returned."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.05
    model.half().save_pretrained(root / "base")
    write_tokenizer(root / "base")
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=["query_key_value" if kind == "bloom" else "q_proj"])
    write_random_adapter(root / "adapter", root / "base", lora, lambda model: None, scale=0.05)
    merge(base=root / "base", adapter=root / "adapter", out=root / "merged", template="alpaca")
    bundle = export(root / "merged", builder="optimum")[0].directory
    prompts = root / "prompts.jsonl"
    prompts.write_text("".join(line + "\n" for line in PROMPTS.read_text().splitlines()[:28]))
    return Made(root / "base", root / "adapter", bundle, bundle, bundle, prompts)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_pair(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def run(llama: Made, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return score_pair(llama, tmp_path_factory.mktemp("scored"))


@pytest.fixture
def copy(llama: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama.merged, tmp_path / "optimum"))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_right_bundle_passes_and_every_mutant_dies(kind: str, tmp_path: Path) -> None:
    made = make_pair(tmp_path, kind)
    found = verify(base=made.base, adapter=made.adapter, bundle=made.merged, prompts=made.prompts)
    assert found.verdict == "PASS", found.summary
    (result,) = found.bundles
    outcomes = {mutant.name: mutant.outcome for mutant in result.mutants}
    assert {name for name, outcome in outcomes.items() if outcome != "killed"} == NOT_APPLICABLE[kind], outcomes
    assert all(mutant.detail for mutant in result.mutants if mutant.outcome == "not applicable")
    judged = {gate.gate for gate in result.gates if gate.outcome == "PASS"}
    weights = {"weights.elements", "weights.untouched", "weights.projection", "weights.names"}
    assert weights | {"graph.max", "graph.kl", "cache.max", "padding.max", "reference.excess"} <= judged
    assert result.provenance == "known"
    # decoded from four places, in chunks, and two pad tokens on each side; no document fills BLOOM's 2048 positions
    assert len(result.cache) == (8 if kind == "bloom" else 9)
    assert all(layer.graph is not None for layer in result.layers)


def failed(run: Run, directory: Path) -> set[str]:
    result = verify_bundle(run, open_bundle(directory))
    assert result.verdict == "FAIL"
    return {gate.gate for gate in result.gates if gate.outcome == "FAIL"}


def test_the_base_as_the_bundle_fails(llama: Made, run: Run, tmp_path: Path) -> None:
    (bundle,) = export(llama.base, builder="optimum", out=tmp_path)
    assert {"weights.projection", "weights.elements", "evidence.distinct"} <= failed(run, bundle.directory)


@pytest.mark.parametrize("share", [-1.0, 0.0, 0.5, 2.0])
def test_an_adapter_merged_at_a_wrong_scale_fails(share: float, llama: Made, run: Run, copy: Path) -> None:
    """In one of two layers, with the hash redone: the flipped sign, not at all, by half, twice."""
    base = load_file(llama.base / "model.safetensors")[Q_PROJ].float()
    delta = load_file(copy / "weights.safetensors")[Q_PROJ] - base
    replace_tensors(copy, "weights.safetensors", {Q_PROJ: base + share * delta}, update=False)
    with pytest.raises(InputRefused, match="SHA-256"):
        open_bundle(copy)
    update_manifest(copy, "weights.safetensors")
    found = check_weights(open_bundle(copy), run.oracle, load_thresholds().projection).gates
    assert {gate.gate for gate in found if gate.outcome == "FAIL"} == {"weights.projection", "weights.elements"}


def test_a_weight_of_one_layer_that_no_adapter_changes_fails(run: Run, copy: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    changed = load_file(copy / "weights.safetensors")[name]
    changed[3, 5] += 2**-12
    replace_tensors(copy, "weights.safetensors", {name: changed})
    assert "weights.untouched" in failed(run, copy)


def test_a_weight_that_the_tracer_folded_away_is_named(
    llama: Made, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph then computes with a value that is no tensor of the checkpoint: nobody can say that it is right."""

    def fold(traced: onnx.ModelProto, path: Path) -> None:
        norm = next(one for one in traced.graph.initializer if one.name == "model.norm.weight")
        norm.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(norm) * 2, norm.name))
        onnx.save(traced, path)

    after_tracing(monkeypatch, fold)
    (made,) = export(llama.base.with_name("merged"), builder="optimum", out=tmp_path)
    bundle = open_bundle(made.directory)
    (names,) = (
        gate
        for gate in check_weights(bundle, run.oracle, load_thresholds().projection).gates
        if gate.gate == "weights.names"
    )
    assert (names.outcome, names.detail) == ("FAIL", "21 tensors; 1 of 21 tensors are missing or foreign: norm.weight")
    with pytest.raises(InputRefused, match=r"weights are missing, such as 'model\.norm\.weight'"):
        verify_bundle(run, bundle)


def edited(directory: Path, change: Callable[[onnx.ModelProto], object]) -> Path:
    """The graph changed, and its hash redone."""
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    change(model)
    (directory / "model.onnx").write_bytes(model.SerializeToString())
    update_manifest(directory, "model.onnx")
    return directory


def test_a_graph_that_reads_a_weight_untransposed_is_blamed_on_the_graph(run: Run, copy: Path) -> None:
    """The weights are right, and are used wrongly."""

    def drop(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.output[0] == Q_PROJ + TRANSPOSED)
        node.op_type = "Identity"

    assert failed(run, edited(copy, drop)) >= {"graph.max", "graph.nmse"}


def test_two_weights_with_exchanged_places_are_refused(copy: Path) -> None:
    def exchange(model: onnx.ModelProto) -> None:
        one, other = (
            next(tensor for tensor in model.graph.initializer if tensor.name == Q_PROJ.replace("1", layer))
            for layer in "01"
        )
        one.name, other.name = other.name, one.name

    with pytest.raises(InputRefused, match=r"layers\.\d\S+ of model\.onnx points at the tensor 'model\.layers"):
        open_bundle(edited(copy, exchange))


@pytest.mark.parametrize(("domain", "kind"), [("", "Loop"), ("", "If"), ("ai.onnx.contrib", "Run")])
def test_operators_that_no_graph_needs_are_refused(domain: str, kind: str, copy: Path) -> None:
    def add(model: onnx.ModelProto) -> None:
        model.graph.node.append(onnx.helper.make_node(kind, ["logits"], ["more"], domain=domain))

    with pytest.raises(InputRefused, match=f"holds the operator .*{kind}"):
        open_bundle(edited(copy, add))


def test_a_traced_graph_in_another_bundle_is_refused(copy: Path) -> None:
    """Only where the manifest says that optimum traced it may a graph make tensors of any size."""
    (copy / "exporter.json").unlink()
    with pytest.raises(InputRefused, match="holds the operator ConstantOfShape"):
        open_bundle(copy)
