"""Every command and every piece of Python in docs/verifying.md and docs/ci.md runs as printed, on a small pair."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from exporter import cli
from exporter.graph.export import export
from exporter.merging.merge import merge
from exporter.parity.documents import LEVELS, PACKAGED, LevelSize, read_rows
from exporter.parity.gates import load_thresholds
from exporter.report.figures import NAMES
from exporter.report.write import FILES
from tests.parity.conftest import PROMPTS, write_adapter, write_base

DOCS = Path(__file__).parents[2] / "docs"
TEXTS = {name: (DOCS / name).read_text() for name in ("verifying.md", "ci.md")}
PLACEHOLDERS = {"BASE": "base", "ADAPTER": "adapter", "BUNDLE": "merged"}


def blocks(name: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", TEXTS[name], re.S)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("docs")
    write_adapter(place / "adapter", write_base(place / "base", layers=2))
    merge(base=place / "base", adapter=place / "adapter", out=place / "merged", template="alpaca")
    export(place / "merged")
    (place / "prompts.jsonl").write_text("".join(line + "\n" for line in PROMPTS.read_text().splitlines()[:12]))
    return place


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Run one command line of the docs in `place`, as the console script does; what it printed on stdout."""
    monkeypatch.chdir(place)
    monkeypatch.setitem(LEVELS, "commit", LevelSize(documents=12, response_tokens=64, texts=False))  # for time alone

    def run(line: str) -> str:
        words = [PLACEHOLDERS.get(word, word) for word in shlex.split(line.split(" ||")[0])]
        target = words[words.index(">") + 1] if ">" in words else None
        monkeypatch.setattr("sys.argv", words[: words.index(">")] if target else words)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        assert ended.value.code == 0, printed.out + printed.err
        if target:
            (place / target).write_text(printed.out)
        return printed.out

    return run


@pytest.mark.slow
def test_the_commands_and_the_python_run(
    run: Callable[[str], str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [line for name in TEXTS for block in blocks(name, "sh") for line in block.splitlines()]
    assert len(lines) >= 6
    for line in dict.fromkeys(lines):
        assert run(line).strip()
        if "--report" in line:
            assert {path.name for path in (place / "parity").iterdir()} == set(FILES)
    assert json.loads((place / "verification.json").read_text())["verdict"] == "PASS"
    for name in TEXTS:
        for code in blocks(name, "python"):
            for placeholder, directory in PLACEHOLDERS.items():
                code = code.replace(f'"{placeholder}"', f'"{directory}"')
            exec(compile(code, name, "exec"), {})
            assert capsys.readouterr().out.startswith("PASS")


def test_the_prompts_of_the_docs_are_read(tmp_path: Path) -> None:
    (block,) = blocks("verifying.md", "json")
    (tmp_path / "prompts.jsonl").write_text(block)
    pair, text = read_rows(tmp_path / "prompts.jsonl")
    assert pair.instruction
    assert pair.output
    assert text.text


def test_the_facts_of_the_docs_are_those_of_the_code() -> None:
    text = TEXTS["verifying.md"]
    letters = re.findall(r"^\| ([A-Z][A-Z0-9, ]*) \|", text, re.M)
    assert {letter for row in letters for letter in row.split(", ")} == set(NAMES)
    gates = {gate.id.partition(".")[0] for gate in load_thresholds().gates}
    assert gates <= set(re.findall(r"`(\w[\w-]*)\.", text))
    commit, nightly = LEVELS["commit"], LEVELS["nightly"]
    assert f"| `commit` | {commit.documents} | up to {commit.response_tokens} |" in text
    rows, texts = (len((PACKAGED / name).read_text().splitlines()) for name in ("alpaca.jsonl", "texts.jsonl"))
    assert f"| `nightly` | all {rows} | up to {nightly.response_tokens} |" in text
    assert f"| `release` | all {rows}, and {texts} texts" in text
    needed = {(gate.tokens, gate.documents) for gate in load_thresholds().gates if gate.required and gate.tokens > 1}
    assert needed == {(200, 8)}


def test_links_lead_somewhere() -> None:
    for name, text in TEXTS.items():
        for target in re.findall(r"\]\(([^)]+)\)", text):
            file, _, anchor = target.partition("#")
            linked = (DOCS / file).read_text() if file else text
            headings = {
                re.sub(r"[^\w -]", "", line.lower()).strip().replace(" ", "-")
                for line in linked.splitlines()
                if line.startswith("#")
            }
            assert not anchor or anchor in headings, f"{name}: {target}"
