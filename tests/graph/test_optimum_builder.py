"""Architectures without a builder go through optimum; their bundles run like the others."""

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import OPTConfig, OPTForCausalLM

from exporter.errors import EnvironmentLacking, InputRefused, UsageError
from exporter.graph.export import export
from exporter.graph.optimum_builder import estimate_cost
from exporter.graph.optimum_weights import Placed
from exporter.graph.weights import WEIGHTS
from exporter.manifest import MANIFEST
from exporter.runtime.load import load
from exporter.sources.checkpoint import Checkpoint, open_checkpoint
from exporter.sources.tensors import TensorInfo
from tests.graph.conftest import tiny_model, tokens
from tests.notes import Notes


def opt(directory: Path) -> OPTForCausalLM:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=97,
        hidden_size=32,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=64,
        max_position_embeddings=32,
    )
    model = OPTForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model


def test_an_unknown_architecture_names_the_way_out(tmp_path: Path) -> None:
    opt(tmp_path)
    with pytest.raises(InputRefused, match=r"'opt'[\s\S]*gpt2 \(GPT-2[\s\S]*gpt_neox[\s\S]*--builder optimum"):
        export(tmp_path)


def test_an_optimum_bundle_computes_what_transformers_computes(tmp_path: Path) -> None:
    pytest.importorskip("optimum.exporters.onnx", reason="optimum's ONNX part is not installed", exc_type=ImportError)
    model = opt(tmp_path / "merged")
    notes = Notes()
    bundle = export(tmp_path / "merged", builder="optimum", progress=notes)[0]
    stored = sum(tensor.numel() for tensor in load_file(tmp_path / "merged" / "model.safetensors").values())
    assert re.search(r"about 1\.1 GB of memory \(its float32 weights are \d+\.\d kB\) and 13 s", notes.said[0])
    assert bundle.section["estimated"]["weights"] == 4 * stored
    assert (bundle.directory, bundle.precision) == (tmp_path / "optimum", "optimum")
    runner, ids = load(bundle, threads=1), tokens(20, vocabulary=97)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    for chunk in (20, 6):
        np.testing.assert_allclose(runner.logits(ids, chunk=chunk), expected, atol=1e-4, rtol=0)
    prompts = [ids[:3], ids[5:14]]
    for prompt, answer in zip(prompts, runner.generate(prompts, 8, stop_tokens=()), strict=True):
        given = torch.tensor([prompt])  # with a mask: transformers would guess one, and hide OPT's pad token 1
        mask = torch.ones_like(given)
        expected = model.generate(given, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert answer == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("precision", "target"), [(["int8"], ["cpu"]), (["native", "fp32"], ["cpu"]), (["native"], ["cuda"])]
)
def test_what_optimum_does_not_export_is_refused(tmp_path: Path, precision: list[str], target: list[str]) -> None:
    """It exports float32 for the CPU, and no bundle is called what it is not."""
    opt(tmp_path / "merged")
    with pytest.raises(UsageError, match="--builder optimum with another precision or target"):
        export(tmp_path / "merged", builder="optimum", precision=precision, target=target)
    assert not (tmp_path / "optimum").exists()


def test_without_optimum_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opt(tmp_path / "merged")
    monkeypatch.setitem(sys.modules, "optimum.exporters.onnx", None)
    with pytest.raises(EnvironmentLacking, match="cannot be imported"):
        export(tmp_path / "merged", builder="optimum")


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optimum.exporters.onnx", reason="optimum's ONNX part is not installed", exc_type=ImportError)
    opt(tmp_path / "merged")
    needed = estimate_cost(open_checkpoint(tmp_path / "merged")).memory
    monkeypatch.setattr("exporter.graph.optimum_builder.free_main_memory", lambda: needed - 1)
    monkeypatch.setattr("exporter.graph.optimum_builder._trace", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(EnvironmentLacking, match=r"takes about 1\.\d GB of memory .*two cores, and 1\.\d GB are free"):
        export(tmp_path / "merged", builder="optimum")
    assert not (tmp_path / "optimum").exists()


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """An export without optimum's part; says whether the next one leaves weights beside its graph."""
    has_weights = True

    def place_weights(graph: Path, *_: object) -> Placed:
        if not has_weights:
            return Placed({}, {}, ())
        graph.with_name(WEIGHTS).write_bytes(b"weights")
        return Placed({"w": "digest"}, {}, ())

    def choose(choice: bool) -> None:
        nonlocal has_weights
        has_weights = choice

    def trace(_: Path, output: Path) -> None:
        (output / "model.onnx").write_bytes(b"graph")

    module = "exporter.graph.optimum_builder"
    monkeypatch.setattr(f"{module}._require_optimum", lambda: None)
    monkeypatch.setattr(f"{module}._trace", trace)
    monkeypatch.setattr(f"{module}.place_weights", place_weights)
    return choose


def test_nothing_of_the_model_exported_before_stays(tmp_path: Path, untraced: Callable[[bool], None]) -> None:
    opt(tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    for name in ("chat_template.jinja", "added_tokens.json"):
        (tmp_path / "first" / name).write_text("{}")
    (bundle,) = export(tmp_path / "first", builder="optimum")
    assert {"chat_template.jinja", "added_tokens.json", WEIGHTS} <= bundle.section["files"].keys()
    untraced(False)
    assert export(tmp_path / "second", builder="optimum") == [bundle]
    assert {file.name for file in bundle.directory.iterdir()} == {*bundle.section["files"], MANIFEST}
    assert not {"chat_template.jinja", "added_tokens.json", WEIGHTS} & bundle.section["files"].keys()


def test_somebodys_model_named_optimum_is_kept(tmp_path: Path, untraced: Callable[[bool], None]) -> None:
    opt(tmp_path / "merged")
    mine = tmp_path / "optimum"
    tiny_model(mine)
    export(mine)
    before = {file.name: file.read_bytes() for file in mine.iterdir()}
    with pytest.raises(UsageError, match="holds something else"):
        export(tmp_path / "merged", builder="optimum")
    with pytest.raises(UsageError, match="checkpoint's own directory"):
        export(mine, builder="optimum", force=True)
    assert {file.name: file.read_bytes() for file in mine.iterdir()} == before


@pytest.mark.parametrize(("parameters", "gigabytes", "seconds"), [(111e6, 2.7, 23), (590e6, 9.5, 67)])
def test_the_estimate_gives_back_what_was_measured(parameters: float, gigabytes: float, seconds: float) -> None:
    """optimum 2.1, float32 GPT-2 shapes, 2 cores."""
    info = TensorInfo("w", "F16", (int(parameters),), Path("none"), 0, 2 * int(parameters))
    cost = estimate_cost(Checkpoint(Path("none"), {}, {"w": info}, ()))
    assert abs(cost.memory / 1e9 - gigabytes) < 0.1 * gigabytes
    assert abs(cost.seconds - seconds) < 0.1 * seconds
    assert 4 <= cost.memory / (4 * parameters) <= 6.1
