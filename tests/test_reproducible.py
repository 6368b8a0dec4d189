"""Two runs give the same bytes: other places, times, hash seeds and numbers of threads; only the stamps are local."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.pairs import gpt2_config, make_pair

PROGRAM = """
import sys, exporter
base, adapter, out = sys.argv[1:]
exporter.merge(base=base, adapter=adapter, out=out + "/merged", template="alpaca", shard_size=400_000)
exporter.export(out + "/merged", precision=["native", "int8", "int4"], target=["cpu", "cuda"])
exporter.export(base=base, adapter=[f"name={adapter}"], adapters="separate", out=out + "/separate")
"""
# Of an entry of `files` in exporter.json: when and where the file was written, which only this machine's disk knows.
LOCAL = ("mtime_ns", "inode")


def make(place: Path, base: Path, adapter: Path, **environment: str) -> Path:
    # One core for the first run, all of them for the second: blocks then come in another order.
    cores = sorted(os.sched_getaffinity(0))[: int(environment["OMP_NUM_THREADS"])]
    subprocess.run(
        [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {cores})\n{PROGRAM}", base, adapter, place],
        check=True,
        env=os.environ | environment,
        timeout=300,
    )
    return place


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("reproducible")
    pair = make_pair(root, gpt2_config(n_embd=128, n_head=8))
    first = make(root / "first", pair.base, pair.adapter, PYTHONHASHSEED="1", OMP_NUM_THREADS="1", TZ="UTC")
    elsewhere = root / "another place" / "second"
    second = make(
        elsewhere, pair.base, pair.adapter, PYTHONHASHSEED="2", OMP_NUM_THREADS="2", TZ="Asia/Tokyo", LC_ALL="C"
    )
    return first, second


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def without_stamps(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_stamps(one) for key, one in value.items() if key not in LOCAL}
    return [without_stamps(one) for one in value] if isinstance(value, list) else value


def test_every_file_but_the_manifests_has_the_same_bytes(twice: tuple[Path, Path]) -> None:
    first, second = map(files, twice)
    assert set(first) == set(second)
    assert {name for name in first if first[name] != second[name]} <= {n for n in first if n.endswith("exporter.json")}
    kinds = {Path(name).suffix for name in first}
    assert {".safetensors", ".onnx", ".onnx_adapter", ".json", ".jinja", ".md"} <= kinds
    assert sum(name.endswith(".safetensors") for name in first) >= 6


def test_the_manifests_differ_in_their_stamps_alone(twice: tuple[Path, Path]) -> None:
    first, second = map(files, twice)
    manifests = [name for name in first if name.endswith("exporter.json")]
    assert len(manifests) == 6
    for name in manifests:
        assert without_stamps(json.loads(first[name])) == without_stamps(json.loads(second[name])), name
