"""Every mutant that applies dies: in every format and target, in a deep model, and at every level."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from transformers import GPT2LMHeadModel

import exporter
from exporter.demonstration import PAIR
from exporter.graph.export import export
from exporter.merging.merge import merge
from exporter.parity import graphs
from exporter.parity.bundle_check import Run, _subject
from exporter.parity.bundles import Bundle
from exporter.parity.documents import LEVELS
from exporter.parity.gates import load_thresholds
from exporter.parity.graph_mutants import graph_mutants
from exporter.parity.inputs import make_documents, open_pair
from exporter.parity.merge_mutants import merge_mutants
from exporter.parity.oracle import Oracle
from exporter.parity.result import Mutant
from exporter.parity.scoring import LogitStore
from exporter.progress import SILENT
from exporter.prompts import ALPACA
from exporter.runtime import session
from tests.parity.conftest import PROMPTS, open_bundle, write_adapter, write_base

DEPTH = 24
KINDS = ("native", "fp32", "int8", "int4", "int8-exact", "cuda", "int8 cuda")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base of 24 layers with an adapter that is not zero, merged, in every format."""
    root = tmp_path_factory.mktemp("deep")
    model: GPT2LMHeadModel = write_base(root / "base", layers=DEPTH)
    write_adapter(root / "adapter", model)
    merged = merge(base=root / "base", adapter=root / "adapter", out=root / "out" / "merged", template="alpaca")
    native, int8, int4 = export(merged.directory, precision=("native", "int8", "int4"))
    (wide,) = export(merged.directory, precision=("fp32",), out=root / "wide")
    (exact,) = export(base=root / "base", adapter=root / "adapter", precision=("int8-exact",), out=root / "exact")
    shutil.copytree(native.directory, root / "cuda")
    for name in ("model.onnx", "genai_config.json", "exporter.json"):
        (root / "cuda" / name).unlink()
    (cuda,) = export(root / "cuda", target=("cuda",))
    (int8_cuda,) = export(merged.directory, precision=("int8",), target=("cuda",))
    made = (native, wide, int8, int4, exact, cuda, int8_cuda)
    directories = {kind: bundle.directory for kind, bundle in zip(KINDS, made, strict=True)}
    return directories | {"base": root / "base", "adapter": root / "adapter"}


def mutants_of(bundle: Bundle, base: Path, adapter: Path, scratch: Path) -> list[Mutant]:
    """The mutants of one bundle, which need no reference."""
    pair = open_pair(base, [(adapter, 1.0)])
    oracle = Oracle(pair.base, pair.weighted, bundle.onto)
    documents, _ = make_documents(pair, PROMPTS, "commit", ALPACA)
    store, none = LogitStore(scratch, documents, pair.vocabulary), cast(Any, None)
    run = Run(pair, oracle, documents, store, none, none, load_thresholds(), "commit", SILENT, "whole")
    gates = [g for g in run.thresholds.gates if bundle.format in g.formats and bundle.target in g.targets]
    subject = _subject(run, bundle)
    return [*merge_mutants(bundle, oracle, run.thresholds.projection), *graph_mutants(subject, gates)]


def assert_all_dead(mutants: Sequence[Mutant], spared: set[str]) -> None:
    assert [mutant.name for mutant in mutants if mutant.outcome == "survived"] == []
    assert {mutant.name for mutant in mutants if mutant.outcome == "not applicable"} == spared
    for mutant in mutants:
        assert mutant.outcome != "killed" or set(mutant.killed_by) <= set(mutant.expected)
        assert mutant.outcome != "killed" or mutant.killed_by


@pytest.mark.parametrize("kind", KINDS)
def test_every_mutant_of_a_deep_model_dies(
    kind: str, deep: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cuda graph, in float16, runs here on a CPU: what is asked is whether its gates see a wrong graph."""
    spared = {"transposed"}
    if "cuda" in kind:
        monkeypatch.setattr(session, "PROVIDERS", session.PROVIDERS | {"cuda": session.PROVIDERS["cpu"]})
        monkeypatch.setattr(graphs, "require_provider", lambda target: None)
        monkeypatch.setattr("exporter.runtime.memory.free_memory", lambda provider: 1 << 40)
        spared |= {"padding not masked"}
    bundle = open_bundle(deep[kind])
    assert bundle.target == ("cuda" if "cuda" in kind else "cpu")
    found = mutants_of(bundle, deep["base"], deep["adapter"], tmp_path)
    assert len(found) >= 16
    assert_all_dead(found, spared)


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_every_mutant_of_the_demo_pair_dies_at_every_level(level: str, tmp_path: Path) -> None:
    merged = merge(base=PAIR / "base", adapter=PAIR / "adapter", out=tmp_path / "merged", template="alpaca")
    made = export(merged.directory, precision=("native", "int8", "int4"))
    bundles = [bundle.directory for bundle in made]
    found = exporter.verify(base=PAIR / "base", adapter=PAIR / "adapter", bundle=bundles, level=level)  # type: ignore[arg-type]
    assert found.bundles[0].verdict == found.bundles[1].verdict == "PASS", found.summary
    for bundle in found.bundles:
        assert bundle.correctness == "PASS"
        assert_all_dead(bundle.mutants, {"transposed"})


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_a_deep_model_passes_at_every_level(level: str, deep: dict[str, Path]) -> None:
    bundles = [deep["native"], deep["int8"]]
    found = exporter.verify(base=deep["base"], adapter=deep["adapter"], bundle=bundles, level=level)  # type: ignore[arg-type]
    for bundle in found.bundles:
        assert bundle.correctness == "PASS", found.summary
        assert_all_dead(bundle.mutants, {"transposed"})
        assert len(bundle.layers) == DEPTH + 2
