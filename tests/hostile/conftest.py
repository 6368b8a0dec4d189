"""A copy of the good material for every case, a directory that nobody may touch, and the command line in-process."""

import functools
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import matplotlib.font_manager  # noqa: F401 (it writes a cache of the machine's fonts when it is first imported)
import pytest
import typer

from exporter import cli
from tests.hostile.guard import Outside, guarded
from tests.hostile.material import Tree, copy_material, make_material


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="session")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    directory = tmp_path_factory.mktemp("outside")
    watch = Outside(directory)
    yield watch
    watch.close()


@pytest.fixture
def tree(material: Path, outside: Outside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    root = tmp_path / "case"
    made = copy_material(material, root, outside.directory)
    monkeypatch.chdir(root)
    return made


@pytest.fixture(autouse=True, scope="session")
def _one_parser() -> Iterator[None]:
    """typer makes its parser anew in each call: a third of what a refused call takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", functools.cache(typer.main.get_command))
        yield


@pytest.fixture(autouse=True)
def _a_second_for_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporter.templates.SECONDS", 1.0)


class CommandLine:
    """`exporter ...` called in this process, under guard."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def run(self, tree: Tree, watch: Outside, arguments: list[object]) -> tuple[int, str, list[str]]:
        """Its exit code, what it printed, and what it did that no input may cause."""
        self._monkeypatch.setattr(sys, "argv", ["exporter", *map(str, arguments)])
        self._capsys.readouterr()
        with guarded(tree.root.parent, watch) as violations, pytest.raises(SystemExit) as done:
            cli.main()
        out, said = self._capsys.readouterr()
        code = done.value.code
        return (code if isinstance(code, int) else 0), out + said, violations


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[CommandLine]:
    before = dict(os.environ)
    with warnings.catch_warnings():
        yield CommandLine(monkeypatch, capsys)
    logging.disable(logging.NOTSET)
    os.environ.clear()
    os.environ.update(before)
