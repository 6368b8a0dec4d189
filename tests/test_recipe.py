"""The first user's recipe, from a hub on loopback that serves a small pair in the layout of 2023."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.hub_server import Hub, hub
from tests.pairs import as_bin
from tests.parity.conftest import write_adapter, write_base

__all__ = ["hub"]
RECIPE = Path(__file__).parents[1] / "recipes/gpt-6.7b-alpaca.toml"


@pytest.fixture
def published(hub: Hub, tmp_path: Path) -> Hub:
    """Sharded pytorch_model*.bin with attention buffers, adapter_model.bin, no chat template."""
    base, adapter = tmp_path / "old/base", tmp_path / "old/adapter"
    write_adapter(adapter, write_base(base, layers=2))
    as_bin(base, shards=2, old_buffers=True)
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    hub.publish("cerebras/Cerebras-GPT-6.7B", base)
    hub.publish("lucasmccabe-lmi/GPT-6.7B-CleanedAlpaca-1", adapter)
    return hub


def test_the_recipe_is_all_that_is_needed(published: Hub, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "exporter.cli", "run", str(RECIPE), "--json"]
    environment = os.environ | dict(published.env)
    first = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=600)
    assert first.returncode in (0, 3), first.stderr  # int4 of so small a model may need more tokens than this level has
    out = tmp_path / "artifacts/gpt-6.7b-alpaca"
    verification = json.loads((out / "parity/verification.json").read_text())
    verdicts = {Path(bundle["directory"]).name: bundle["verdict"] for bundle in verification["bundles"]}
    assert verdicts["merged"] == verdicts["int8"] == "PASS"
    assert verdicts["int4"] in ("PASS", "INCONCLUSIVE")
    request = json.loads((out / "merged/exporter.json").read_text())["stages"]["merge"]["request"]
    assert request["base"]["source"] == "cerebras/Cerebras-GPT-6.7B"
    assert len(request["base"]["commit"]) == 40
    asked = len(published.requests)
    again = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment | {"HF_HUB_OFFLINE": "1"}, timeout=60
    )
    assert again.returncode == first.returncode, again.stderr
    assert all(stage["skipped"] for stage in json.loads(again.stdout)["stages"])
    assert len(published.requests) == asked
