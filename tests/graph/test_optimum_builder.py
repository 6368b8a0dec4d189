"""Architectures without a builder go through optimum; their bundles run like the others."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from exporter.errors import EnvironmentLacking, InputRefused
from exporter.graph import export
from exporter.runtime.load import load
from tests.graph.conftest import tokens


def neox(directory: Path) -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    model = GPTNeoXForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model


def test_an_unknown_architecture_names_the_way_out(tmp_path: Path) -> None:
    neox(tmp_path)
    with pytest.raises(InputRefused, match=r"gpt_neox[\s\S]*--builder optimum"):
        export(tmp_path)


def test_an_optimum_bundle_computes_what_transformers_computes(tmp_path: Path) -> None:
    pytest.importorskip("optimum.exporters.onnx", reason="optimum's ONNX part is not installed", exc_type=ImportError)
    model = neox(tmp_path / "merged")
    bundle = export(tmp_path / "merged", builder="optimum")[0]
    assert (bundle.directory, bundle.precision) == (tmp_path / "optimum", "optimum")
    runner, ids = load(bundle, threads=1), tokens(20, vocabulary=97)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    for chunk in (20, 6):
        np.testing.assert_allclose(runner.logits(ids, chunk=chunk), expected, atol=1e-4, rtol=0)
    prompts = [ids[:3], ids[5:14]]
    for prompt, answer in zip(prompts, runner.generate(prompts, 8, stop_tokens=()), strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert answer == expected[0, len(prompt) :].tolist()


def test_without_optimum_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    neox(tmp_path / "merged")
    monkeypatch.setitem(sys.modules, "optimum.exporters.onnx", None)
    with pytest.raises(EnvironmentLacking, match="cannot be imported"):
        export(tmp_path / "merged", builder="optimum")
