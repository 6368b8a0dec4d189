"""verify where models do not fit into memory: the same figures, less memory, and a killed run goes on."""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config

from exporter.parity.bundle_check import Run
from exporter.parity.bundles import Bundle
from exporter.parity.result import BundleResult, Verification
from exporter.parity.verify import verify
from exporter.progress import SILENT
from tests.pairs import make_pair
from tests.parity.conftest import Made

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parents[2]

KILLED = """
import os, signal, sys
from exporter.parity import blocks
from exporter.parity.verify import verify

run, seen = blocks.BlockModel.run, []
def dying(self, block, tokens, hidden):
    seen.append(block)
    if seen.count(2) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return run(self, block, tokens, hidden)
blocks.BlockModel.run = dying
base, adapter, bundle, prompts, scratch = sys.argv[1:]
verify(base=base, adapter=adapter, bundle=bundle, prompts=prompts, scratch=scratch, memory="blocks")
"""

PEAK = """
import sys
from pathlib import Path
from exporter.parity.bases import BaseOptions
from exporter.parity.blocks_scoring import sweep
from exporter.parity.blocks_specs import truth_blocks
from exporter.parity.models import TruthModels
from exporter.sources.checkpoint import open_checkpoint
from tests.parity.test_blocks import documents

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])

kind, base, adapter, states = sys.argv[1:]
base, adapters = open_checkpoint(Path(base)), [(Path(adapter), 1.0)]
before = peak()
if kind == "whole":
    model = TruthModels(base, adapters).truth()
    for one in documents():
        model.logits(one.tokens)
else:
    sweep(truth_blocks(base, adapters, BaseOptions()), documents(), Path(states), "T")
print(peak() - before)
"""


class Notes:
    """Remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def task(self, title: str, total: float, unit: str = "") -> AbstractContextManager[Any, bool | None]:
        self.said.append(title)
        return SILENT.task(title, total, unit)

    def note(self, message: str) -> None:
        self.said.append(message)


def python(code: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def figures(found: Verification) -> dict[str, Any]:
    """Everything but the time, the paths of feeding that need a whole graph, and what is said of them."""
    values = found.to_dict()
    values["inputs"].pop("seconds")
    for bundle in values["bundles"]:
        bundle.pop("notes")
        bundle.pop("cache")
        bundle["gates"] = [gate for gate in bundle["gates"] if gate["pair"] != "O-D"]
    return values


@pytest.fixture(scope="module")
def killed(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scratch directory of a run that was killed in the third block of T."""
    scratch = tmp_path_factory.mktemp("killed") / "scratch"
    ended = python(KILLED, made.base, made.adapter, made.merged, made.prompts, scratch)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert list(scratch.glob("*/R.f32"))
    return scratch


def test_a_killed_run_goes_on_and_finds_what_whole_models_find(made: Made, killed: Path, tmp_path: Path) -> None:
    scratch, notes = Path(shutil.copytree(killed, tmp_path / "scratch")), Notes()
    asked: Any = {"base": made.base, "adapter": made.adapter, "bundle": made.merged, "prompts": made.prompts}
    found = verify(**asked, scratch=scratch, memory="blocks", progress=notes)
    assert "score R: done before" in notes.said
    assert "score T: 2 of 3 blocks are done already" in notes.said
    assert any("logits in" in said for said in notes.said)
    assert not scratch.exists()
    assert found.verdict == "PASS", found.summary
    assert any("ranges" in note for note in found.bundles[0].notes)
    assert {"decode, past 1", "prefill in chunks of 7", "left-padded batch"} <= {c.name for c in found.bundles[0].cache}

    whole = verify(**asked, memory="whole")
    assert figures(found) == figures(whole)


def test_what_another_run_left_is_not_taken_for_this_one(
    made: Made, killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(run: Run, bundle: Bundle) -> BundleResult:
        raise KeyboardInterrupt

    monkeypatch.setattr("exporter.parity.verify.verify_bundle", stop)
    scratch, others, notes = Path(shutil.copytree(killed, tmp_path / "scratch")), tmp_path / "others.jsonl", Notes()
    others.write_text("".join(made.prompts.read_text().splitlines(keepends=True)[:2]))
    asked: Any = {"base": made.base, "adapter": made.adapter, "bundle": made.merged, "prompts": others}
    with pytest.raises(KeyboardInterrupt):
        verify(**asked, scratch=scratch, progress=notes)
    assert "score R" in notes.said
    assert "score R: done before" not in notes.said


def test_block_by_block_takes_a_fraction_of_the_models_memory(tmp_path: Path) -> None:
    """A model of 57M parameters, 226 MB in float32, in 8 blocks."""
    config = GPT2Config(
        n_embd=768, n_layer=8, n_head=8, n_positions=64, vocab_size=257, bos_token_id=256, eos_token_id=256
    )
    pair = make_pair(tmp_path, config)
    size = 4 * 12 * 768**2 * 8 / 1024  # kilobytes, as /proc counts
    peaks = {}
    for kind in ("whole", "blocks"):
        done = python(PEAK, kind, pair.base, pair.adapter, tmp_path / "states")
        assert done.returncode == 0, done.stderr
        peaks[kind] = int(done.stdout.splitlines()[-1])
    assert peaks["whole"] > 0.9 * size
    assert peaks["blocks"] < 0.5 * size, peaks
