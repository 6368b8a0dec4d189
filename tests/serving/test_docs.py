"""docs/serving.md: its examples run, its options and figures are those that there are."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving.running import Running

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/serving.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.S)
ADDRESS = "http://127.0.0.1:8000"


def run(words: list[str], server: Running) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [word.replace(ADDRESS, server.url) for word in words],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_curl_examples_answer(server: Running) -> None:
    (block,) = [text for kind, text in BLOCKS if kind == "sh" and "curl" in text]
    commands = re.split(r"\n(?=curl)", block.strip())
    assert len(commands) == 3
    chat, stream, models = (run(["bash", "-c", f"set -e; {text}"], server) for text in commands)
    assert '"chat.completion"' in chat
    assert stream.endswith("data: [DONE]\n\n")
    assert '"demo"' in models


@pytest.mark.parametrize("code", [text for kind, text in BLOCKS if kind == "python"])
def test_the_python_examples_answer(server: Running, code: str) -> None:
    assert "cached_tokens" in run([sys.executable, "-c", code], server)


def test_every_option_is_described_and_no_other() -> None:
    from typer.main import get_command

    from exporter.cli import app

    command = get_command(app).commands["serve"]  # pyright: ignore[reportAttributeAccessIssue]
    known = {name for parameter in command.params for name in parameter.opts if name.startswith("--")}
    table = TEXT.partition("## Options")[2].partition("##")[0]
    described = set(
        re.findall(r"--[a-z-]+", "\n".join(line.split("|")[1] for line in table.splitlines() if "|" in line))
    )
    assert described - {"---"} == known - {"--help"}


def test_every_metric_is_described_and_no_other(server: Running) -> None:
    server.post("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 2})
    types = re.findall(r"^# TYPE (exporter_\w+) (\w+)$", server.get("/metrics").text, re.M)
    found = {name for name, kind in types if not name.endswith("_created")}
    assert set(re.findall(r"`(exporter_\w+)`", TEXT)) == found
