"""Every command and every piece of Python in the README runs as printed."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from exporter.demonstration import PAIR
from exporter.graph.export import export
from exporter.merging.merge import merge
from tests.forked import Forks
from tests.parity.conftest import write_adapter, write_base

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)
# `make` sets up environments and `exporter run recipes/...` needs the hub: CI and test_recipe.py run those.
# `exporter serve` does not end: tests/serving.
ELSEWHERE = ("make ", "exporter run recipes/", "exporter serve ")


def commands() -> list[str]:
    lines = [line.split("  #")[0].strip() for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
    table = [match.group(1) for match in re.finditer(r"^\| `(exporter [^`]+)` \|", README, re.M)]
    return [line for line in [*lines, *table] if line and not line.startswith(ELSEWHERE)]


@pytest.fixture(scope="module")
def place(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory where the README's relative paths hold, with a finished native run under artifacts/demo.

    What the README leaves to the reader (BASE, ADAPTER, BUNDLE) is a small pair: a command has seconds.
    """
    place = tmp_path_factory.mktemp("readme")
    (place / "exporter").mkdir()
    (place / "exporter/demo").symlink_to(PAIR)
    run(
        forks,
        place,
        ["merge", "--base", PAIR / "base", "--adapter", PAIR / "adapter", "--template", "alpaca", "--out", "m"],
    )
    (place / "artifacts/demo").mkdir(parents=True)
    (place / "m").rename(place / "artifacts/demo/merged")
    run(forks, place, ["export", "artifacts/demo/merged"])
    write_adapter(place / "adapter", write_base(place / "base", layers=2))
    merge(base=place / "base", adapter=place / "adapter", out=place / "merged", template="alpaca")
    export(place / "merged")
    return place


def run(forks: Forks, place: Path, arguments: list[object]) -> str:
    ended = forks.run([str(one) for one in arguments], directory=place)
    assert ended.code == 0, ended.log
    return ended.out


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme(forks: Forks, place: Path, command: str, tmp_path: Path) -> None:
    values = {"BASE": "base", "B": "base", "ADAPTER": "adapter", "A": "adapter", "TEXT": "The", "FILE": "captured"}
    values |= dict.fromkeys(["CHECKPOINT", "BUNDLE", "MERGED"], "merged")
    words = [values.get(word, word) for word in shlex.split(command)]
    if "DIR" in words:
        for place_of in [i for i, word in enumerate(words) if word == "DIR"]:
            existing = words[place_of - 1] == "--bundle"
            words[place_of] = "merged" if existing else str(tmp_path / "out")
    assert Path(words[0]).name == "exporter"
    assert run(forks, place, list(words[1:])).strip()


@pytest.mark.parametrize("code", [text for kind, text in BLOCKS if kind == "python"])
def test_the_python_of_the_readme(place: Path, code: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=place, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_readme_shows_a_real_run() -> None:
    assert "PASS" in README
    assert "@RUN@" not in README
    assert len(commands()) >= 8
