"""What somebody else put into an output directory is left alone; what an interrupted command left is no obstacle."""

import shutil
from pathlib import Path

import pytest

import exporter
from exporter.errors import UsageError
from exporter.files import LOCK
from exporter.pipeline import run
from tests.faults.commands import Inputs


def test_run_does_not_take_a_lock_file_for_its_own_output(inputs: Inputs, tmp_path: Path) -> None:
    """A native export that was killed leaves one in the user's own model directory."""
    out = tmp_path / "model"
    shutil.copytree(inputs.root / "base", out)
    (out / LOCK).touch()
    before = sorted(path.name for path in out.iterdir())
    with pytest.raises(UsageError, match="model's own directory"):
        run(base=inputs.root / "base", adapter=inputs.root / "adapter", out=out)
    assert sorted(path.name for path in out.iterdir()) == before


@pytest.mark.parametrize("content", ["model.safetensors", "config.json", "deeper/model.safetensors"])
def test_run_does_not_take_somebody_elses_merged_directory(inputs: Inputs, tmp_path: Path, content: str) -> None:
    mine = tmp_path / "out/merged" / content
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(UsageError, match="something else"):
        run(base=inputs.root / "base", adapter=inputs.root / "adapter", out=tmp_path / "out")
    assert mine.read_text() == "mine"


def test_capture_does_not_write_over_something_else(inputs: Inputs, tmp_path: Path) -> None:
    mine = tmp_path / "notes.txt"
    mine.write_text("mine")
    base, adapter = inputs.root / "base", inputs.root / "adapter"
    with pytest.raises(UsageError, match="no capture"):
        exporter.capture(base=base, adapter=adapter, out=mine)
    with pytest.raises(UsageError, match="is a directory"):
        exporter.capture(base=base, adapter=adapter, out=tmp_path)
    assert mine.read_text() == "mine"
