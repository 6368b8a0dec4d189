"""Bundles that a server serves: the demo pair in 8 bits, its base with the adapter apart, and a tiny random model."""

from pathlib import Path

import pytest
from openai import OpenAI

import exporter
from exporter.demonstration import PAIR
from tests.graph.conftest import save_byte_tokenizer, tiny_model
from tests.serving.running import Running, running

TINY_POSITIONS = 64


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The merged demo pair in 8 bits, with the alpaca template."""
    merged = tmp_path_factory.mktemp("served") / "merged"
    exporter.merge(base=PAIR / "base", adapter=PAIR / "adapter", out=merged, template="alpaca", proof="none")
    exporter.export(merged, precision=["int8"])
    return merged.parent / "int8"


@pytest.fixture(scope="session")
def separate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo base with its adapter apart, under the name poet; there is no chat template."""
    directory = tmp_path_factory.mktemp("separate") / "bundle"
    exporter.export(base=str(PAIR / "base"), adapter=[f"poet={PAIR / 'adapter'}"], adapters="separate", out=directory)
    return directory


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, a token a byte, 64 positions."""
    directory = tmp_path_factory.mktemp("tiny-served")
    tiny_model(directory, n_positions=TINY_POSITIONS)
    save_byte_tokenizer(directory)
    exporter.export(directory)
    return directory


@pytest.fixture(scope="session")
def server(demo: Path, separate: Path, tiny: Path):
    with running([f"demo={demo}", f"base={separate}", f"tiny={tiny}"]) as server:
        yield server


@pytest.fixture(scope="session")
def client(server: Running) -> OpenAI:
    return server.client()
