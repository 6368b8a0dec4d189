"""One small pair with what each command reads, and the matrix that a session of these tests writes."""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.commands import COMMANDS, Inputs, made_by, write_spec
from tests.forked import Ended, Forks
from tests.pairs import gpt2_config, make_pair
from tests.parity.conftest import PROMPTS, write_adapter, write_base

MATRIX = "EXPORTER_FAULT_MATRIX"  # names the file for the matrix: `make faults` does, whose session has every row
_cells: dict[tuple[str, str], list[str]] = {}


@dataclass(frozen=True)
class Undisturbed:
    """What a command makes when nothing goes wrong, and how it ends."""

    ended: Ended
    made: Mapping[str, str]


@pytest.fixture(scope="session")
def inputs(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    root = tmp_path_factory.mktemp("inputs")
    write_adapter(root / "adapter", write_base(root / "base"))
    return _complete(forks, root)


@pytest.fixture(scope="session")
def large_inputs(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """13 million weights, so that too little memory is met by them and not by the interpreter alone."""
    root = tmp_path_factory.mktemp("large")
    make_pair(root, gpt2_config(n_embd=1024, n_layer=1, n_positions=256))
    return _complete(forks, root)


def _complete(forks: Forks, root: Path) -> Inputs:
    """What the commands read beside base and adapter."""
    (root / "prompts.jsonl").write_text("".join(line + "\n" for line in PROMPTS.read_text().splitlines()[:4]))
    write_spec(root)
    pair = ["--base", str(root / "base"), "--adapter", str(root / "adapter")]
    for command in (
        ["merge", *pair, "--out", str(root / "merged"), "--template", "alpaca"],
        ["export", str(root / "merged"), "--precision", "int8"],
    ):
        ended = forks.run([*command, "--quiet"])
        assert ended.code == 0, ended.log
    return Inputs(root)


@pytest.fixture(scope="session")
def undisturbed(forks: Forks, inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Undisturbed]:
    known: dict[tuple[str, Path], Undisturbed] = {}

    def of(name: str, large: Inputs | None = None) -> Undisturbed:
        read = large or inputs
        if (name, read.root) not in known:
            out, command = tmp_path_factory.mktemp("wanted") / "out", COMMANDS[name]
            command.begin(read, out)
            ended = forks.run(command.line(read, out))
            assert ended.code in (0, 3), ended.log  # four prompts are not enough evidence
            known[name, read.root] = Undisturbed(ended, made_by(out) if command.writes else {})
        return known[name, read.root]

    return of


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 64 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        yield Path()
        return
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def remount(disk: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(disk)], check=True)


def require(disk: Path) -> None:
    if not disk.name:
        pytest.skip("only root may mount a small file system")


Outcome = Callable[[str], None]


@contextmanager
def matrix(fault: str, command: str) -> Iterator[Outcome]:
    """A cell of the matrix: what the test says of it, or how it failed or was skipped."""
    said: list[str] = []
    try:
        yield said.append
    except BaseException as error:
        kind = "skipped" if isinstance(error, pytest.skip.Exception) else "**FAILED**"
        said.append(f"{kind}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"[:100])
        raise
    finally:
        _cells.setdefault((fault, command), []).extend(said)


def ending(ended: Ended) -> str:
    """How a command ended, as a cell says it."""
    return signal.Signals(-ended.code).name if ended.code < 0 else f"exit {ended.code}"


def points(counts: Mapping[str, int], *calls: str) -> list[tuple[str, int]]:
    """Each of these calls that is made at all, and how often. At least one: else a fault would meet nothing."""
    made = [(call, counts[call]) for call in calls if counts[call]]
    assert made, f"none of {', '.join(calls)} is called: the fault met nothing"
    return made


def pytest_sessionfinish() -> None:
    if not _cells or MATRIX not in os.environ:
        return
    report = Path(os.environ[MATRIX])
    report.parent.mkdir(exist_ok=True)
    faults = list(dict.fromkeys(fault for fault, _ in _cells))
    names = [*COMMANDS, "serve"]
    table = {fault: {name: _cell(fault, name) for name in names} for fault in faults}
    lines = ["| fault | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    lines += [f"| {fault} | " + " | ".join(cells.values()) + " |" for fault, cells in table.items()]
    report.write_text("\n".join(lines) + "\n")
    report.with_suffix(".json").write_text(json.dumps(table, indent=1) + "\n")


def _cell(fault: str, command: str) -> str:
    return "; ".join(dict.fromkeys(_cells.get((fault, command), [])))
