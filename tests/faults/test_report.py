"""What the matrix says is what happened, and it is whole or it is not written."""

import signal
from pathlib import Path

import pytest

from tests.faults import conftest
from tests.faults.conftest import MATRIX, ending, points, pytest_sessionfinish
from tests.forked import Ended


@pytest.mark.parametrize(
    ("code", "said"), [(0, "exit 0"), (5, "exit 5"), (-signal.SIGSEGV, "SIGSEGV"), (-signal.SIGABRT, "SIGABRT")]
)
def test_a_cell_says_how_a_command_ended(code: int, said: str) -> None:
    assert ending(Ended(code, 0.1, {}, "", "")) == said


def test_a_fault_that_met_no_call_fails_its_test() -> None:
    assert points({"pwrite": 0, "fsync": 3}, "pwrite", "fsync") == [("fsync", 3)]
    with pytest.raises(AssertionError, match="the fault met nothing"):
        points({"pwrite": 0, "fsync": 0}, "pwrite", "fsync")


def test_only_a_run_of_every_fault_writes_the_matrix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`make test` leaves rows out and names no file; `make faults` does."""
    monkeypatch.setattr(conftest, "_cells", {("clock", "merge"): ["same bytes"]})
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(MATRIX, raising=False)
    pytest_sessionfinish()
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv(MATRIX, "build/fault-matrix.md")
    pytest_sessionfinish()
    assert "| clock | same bytes |" in (tmp_path / "build/fault-matrix.md").read_text()
    assert (tmp_path / "build/fault-matrix.json").is_file()
