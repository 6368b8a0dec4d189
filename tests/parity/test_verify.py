"""The whole check on a small pair: it passes what is right, and says where it is wrong."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.errors import EnvironmentLacking, InputRefused
from exporter.graph.export import export
from exporter.parity import bundle_check, memory, models
from exporter.parity.bundle_check import Run, verify_bundle
from exporter.parity.capture import capture
from exporter.parity.documents import tokens_sha256
from exporter.parity.gates import load_thresholds
from exporter.parity.inputs import make_documents, open_pair
from exporter.parity.oracle import Oracle
from exporter.parity.pairs import common_pairs
from exporter.parity.result import BundleResult, Verification
from exporter.parity.scoring import LogitStore, Scorer
from exporter.parity.verify import _score_references, verify
from exporter.progress import SILENT, Progress
from exporter.prompts import ALPACA
from exporter.sources.safetensors_file import read_header
from tests.parity.conftest import Made, open_bundle, write_adapter, write_base


@pytest.fixture(scope="module")
def passed(made: Made) -> Verification:
    bundles = [made.merged, made.int8, made.int4]
    return verify(base=made.base, adapter=made.adapter, bundle=bundles, prompts=made.prompts)


@pytest.fixture(scope="module")
def run(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The references, scored once for all tests that damage a bundle."""
    pair = open_pair(made.base, [(made.adapter, 1.0)])
    documents, _ = make_documents(pair, made.prompts, "commit", ALPACA)
    store = LogitStore(tmp_path_factory.mktemp("store"), documents, pair.vocabulary)
    reference = _score_references(pair, store, "int8", tokens_sha256(documents), SILENT)
    common = common_pairs(store, reference)
    oracle = Oracle(pair.base, pair.weighted)
    return Run(pair, oracle, documents, store, reference, common, load_thresholds(), "commit", SILENT)


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.merged, tmp_path / "merged"))


def overwrite(directory: Path, file: str, values: dict[str, torch.Tensor]) -> None:
    """Put other bytes into the place of tensors, and take the manifest away that would refuse them."""
    data = bytearray((directory / file).read_bytes())
    for name, info in read_header(directory / file)[0].items():
        if name in values:
            raw = values[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            assert len(raw) == info.nbytes
            data[info.offset : info.offset + info.nbytes] = raw
    (directory / file).write_bytes(data)
    (directory / "exporter.json").unlink(missing_ok=True)


def failed(result: BundleResult) -> set[str]:
    return {gate.gate for gate in result.gates if gate.outcome == "FAIL"}


def test_right_bundles_pass_with_every_mutant_dead(passed: Verification) -> None:
    assert (passed.verdict, passed.exit_code) == ("PASS", 0), passed.summary
    assert [bundle.format for bundle in passed.bundles] == ["float", "int8", "int4"]
    for bundle in passed.bundles:
        assert bundle.provenance == "known"
        outcomes = {mutant.name: mutant.outcome for mutant in bundle.mutants}
        assert len(outcomes) == 16
        assert {name for name, outcome in outcomes.items() if outcome != "killed"} == {"transposed"}
        for mutant in bundle.mutants:
            assert set(mutant.killed_by) <= set(mutant.expected)
        assert sum(stage.share or 0 for stage in bundle.stages) == pytest.approx(1)
        assert {"R-O", "T-R", "F-O1", "O-D", "O-P"} <= {gate.pair for gate in bundle.gates}
        (cache,) = (gate for gate in bundle.gates if gate.statistic == "cache_nmse")
        assert (cache.outcome, cache.tokens > 0) == ("RECORDED", True)
        assert 0 <= (cache.estimate or 0) < 1e-3
    float_bundle, int8, int4 = passed.bundles
    assert float_bundle.quality is None
    assert (int8.quality, int4.quality) == ("PASS", "PASS")
    shares = {stage.step: stage.share for stage in int4.stages}
    assert (shares["M32 -> F"] or 0) > 0.9  # 4 bits: the quantization, not the graph


def test_the_json_is_finite_and_counts_what_was_scored(passed: Verification) -> None:
    document = json.loads(passed.to_json(), parse_constant=lambda name: pytest.fail(f"{name} in the document"))
    inputs = document["inputs"]
    assert document["schema_version"] == 1
    assert inputs["documents"] == 28
    total = inputs["prompt_tokens"] + inputs["response_tokens"] + inputs["text_tokens"]
    for gate in document["bundles"][0]["gates"]:
        if gate["gate"] == "evidence.count":
            assert gate["tokens"] == total
            assert gate["outcome"] == "PASS"


def test_verify_writes_nothing_into_a_bundle(made: Made, passed: Verification) -> None:
    assert passed.verdict == "PASS"
    for directory in (made.merged, made.int8, made.int4):
        assert not [path for path in directory.iterdir() if path.name.startswith(".") and "lock" not in path.name]
        assert open_bundle(directory).provenance == "known"


def test_a_changed_file_is_refused_by_its_hash(copy: Path) -> None:
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1000] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    with pytest.raises(InputRefused, match="SHA-256"):
        open_bundle(copy)


def test_an_edited_scale_of_a_quantized_bundle_is_refused_or_fails(made: Made, run: Run, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(made.int8, tmp_path / "int8"))
    name = next(n for n in read_header(directory / "weights.safetensors")[0] if n.endswith("c_fc.weight.int8t.scales"))
    scales = load_file(directory / "weights.safetensors")[name]
    scales[3] *= 4
    raw = directory / "exporter.json"
    kept = raw.read_bytes()
    overwrite(directory, "weights.safetensors", {name: scales})
    found = verify_bundle(run, open_bundle(directory))
    assert found.provenance == "unknown"
    assert found.verdict == "FAIL"
    assert "weights.step" in failed(found)
    step = next(gate for gate in found.gates if gate.gate == "weights.step")
    assert "1 of 13" in step.detail
    raw.write_bytes(kept)
    with pytest.raises(InputRefused, match="SHA-256"):
        open_bundle(directory)


def test_the_base_as_the_bundle_fails(made: Made, run: Run, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(made.base, tmp_path / "base"))
    export(directory)
    found = verify_bundle(run, open_bundle(directory))
    assert found.verdict == "FAIL"
    assert {"weights.projection", "weights.elements", "evidence.distinct"} <= failed(found)
    assert next(gate for gate in found.gates if gate.gate == "liveness.gain").outcome != "PASS"


def test_a_damaged_layer_is_named_with_its_stage(made: Made, run: Run, copy: Path) -> None:
    name = "transformer.h.1.attn.c_attn.weight"
    original = load_file(made.base / "model.safetensors")[name]
    overwrite(copy, "model.safetensors", {name: original})
    found = verify_bundle(run, open_bundle(copy))
    assert found.verdict == "FAIL"
    projection = next(gate for gate in found.gates if gate.gate == "weights.projection")
    assert "h.1.attn.c_attn.weight" in projection.detail
    assert "h.0" not in projection.detail
    shares = {stage.step: stage.share or 0 for stage in found.stages}
    assert max(shares, key=lambda step: shares[step]) == "M32 -> F"  # in the weights, not in the graph


def test_a_wrong_graph_is_blamed_on_the_graph(run: Run, copy: Path) -> None:
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            for attribute in node.attribute:
                if attribute.name == "scale":
                    attribute.f *= 1.2
    (copy / "model.onnx").write_bytes(model.SerializeToString())
    (copy / "exporter.json").unlink()
    found = verify_bundle(run, open_bundle(copy))
    assert found.verdict == "FAIL"
    assert {"graph.max", "graph.nmse"} <= failed(found)
    assert not {gate for gate in failed(found) if gate.startswith("weights.")}
    shares = {stage.step: stage.share or 0 for stage in found.stages}
    assert max(shares, key=lambda step: shares[step]) == "F -> O"


def test_nan_weights_fail_and_the_document_stays_json(run: Run, copy: Path) -> None:
    name = "transformer.ln_f.weight"
    broken = load_file(copy / "model.safetensors")[name]
    broken[0] = float("nan")
    overwrite(copy, "model.safetensors", {name: broken})
    found = verify_bundle(run, open_bundle(copy))
    assert found.verdict == "FAIL"
    assert "finite" in failed(found)


def test_a_surviving_mutant_makes_the_run_invalid(run: Run, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    real = bundle_check.graph_mutants

    def spare(subject, gates):
        first, *others = real(subject, gates)
        return [replace(first, outcome="survived", killed_by=()), *others]

    monkeypatch.setattr(bundle_check, "graph_mutants", spare)
    found = verify_bundle(run, open_bundle(made.merged))
    assert found.correctness == "PASS"
    assert found.verdict == "INCONCLUSIVE"
    assert "positions + 1" in found.notes[-1]


def test_a_model_compared_with_itself_is_no_evidence(run: Run, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    class Echo:
        def __init__(self, store: LogitStore) -> None:
            self.rows = [store.read("R", document) for document in store.documents]
            self.documents, self.at = store.documents, 0

        def logits(self, tokens, /) -> np.ndarray:
            document, rows = self.documents[self.at], self.rows[self.at]
            self.at += 1
            logits = np.zeros((len(tokens), rows.shape[1]), np.float32)
            logits[document.positions] = rows
            return logits

    real = run.store.score

    def echoing(model: str, scorer: Scorer, progress: Progress = SILENT, content: str = "") -> None:
        real(model, Echo(run.store) if model == "O" else scorer, progress, content)

    monkeypatch.setattr(run.store, "score", echoing)
    found = verify_bundle(run, open_bundle(made.merged))
    assert ("evidence.distinct", "FAIL") in {(g.gate, g.outcome) for g in found.gates if g.pair == "R-O"}
    assert found.verdict == "FAIL"


def test_a_capture_stands_in_for_the_reference(made: Made, passed: Verification, tmp_path: Path) -> None:
    file = tmp_path / "reference.safetensors"
    written = capture(base=made.base, adapter=made.adapter, out=file, prompts=made.prompts, template="alpaca")
    assert written.documents == 28
    found = verify(base=made.base, adapter=made.adapter, bundle=made.merged, prompts=made.prompts, reference=file)
    assert found.verdict == "PASS", found.summary

    def distance(result: Verification) -> float:
        gates = result.bundles[0].gates
        value = next(g for g in gates if g.gate == "recorded" and g.pair == "R-O" and g.statistic == "kl_mean").estimate
        assert value is not None
        return value

    assert distance(found) == pytest.approx(distance(passed), rel=0.05)
    plain = capture(base=made.base, adapter=made.adapter, out=tmp_path / "plain", prompts=made.prompts)
    with pytest.raises(InputRefused, match="other tokens"):
        verify(base=made.base, adapter=made.adapter, bundle=made.merged, prompts=made.prompts, reference=plain.path)


def test_another_tokenizer_is_refused(made: Made, copy: Path) -> None:
    content = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (copy / "tokenizer.json").write_text(json.dumps(content))
    (copy / "exporter.json").unlink()
    with pytest.raises(InputRefused, match=r"tokenizer"):
        verify(base=made.base, adapter=made.adapter, bundle=copy, prompts=made.prompts)


def test_a_directory_without_a_graph_is_refused(made: Made) -> None:
    with pytest.raises(InputRefused, match="no ONNX graph"):
        verify(base=made.base, adapter=made.adapter, bundle=made.base, prompts=made.prompts)


def test_a_zero_adapter_is_refused(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.adapter, tmp_path / "zero")
    tensors = load_file(tmp_path / "zero" / "adapter_model.safetensors")
    tensors = {name: value * 0 if "lora_B" in name else value for name, value in tensors.items()}
    save_file(tensors, tmp_path / "zero" / "adapter_model.safetensors")
    with pytest.raises(InputRefused, match="changes nothing"):
        verify(base=made.base, adapter=tmp_path / "zero", bundle=made.merged, prompts=made.prompts)


def test_another_bases_adapter_is_refused(made: Made, tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", write_base(tmp_path / "base", layers=4))
    with pytest.raises(InputRefused):
        verify(base=made.base, adapter=tmp_path / "adapter", bundle=made.merged, prompts=made.prompts)


def test_missing_bitsandbytes_names_the_extra(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError

    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(models, "version", absent)
    with pytest.raises(EnvironmentLacking, match=r"exporter\[int8\]"):
        models.load_reference(open_pair(made.base, [(made.adapter, 1.0)]).base, [(made.adapter, 1.0)])


def test_too_little_memory_is_said_before_loading(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = open_pair(made.base, [(made.adapter, 1.0)])
    monkeypatch.setattr(memory, "free_memory", lambda provider: 1000)
    with pytest.raises(EnvironmentLacking, match="memory"):
        models.TruthModels(pair.base, pair.weighted)


def test_few_prompts_are_not_enough_evidence(made: Made, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text('{"instruction": "Say hello.", "output": "Hello."}\n')
    found = verify(base=made.base, adapter=made.adapter, bundle=made.merged, prompts=few)
    assert (found.verdict, found.exit_code) == ("INCONCLUSIVE", 3)
