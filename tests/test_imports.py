"""Data flows one way and imports follow it: a stage never imports a later one."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from exporter.graph.export import export
from tests.graph.conftest import tiny_model

PACKAGE = Path(__file__).parents[1] / "exporter"
BOTTOM = {"errors", "progress", "files", "manifest", "prompts", "templates", "json_text"}
FLOW = ["sources", "merging", "graph", "runtime", "serving", "parity", "report"]
TOP = {
    "spec",
    "inspection",
    "manifest_check",
    "verification",
    "pipeline",
    "demonstration",
    "diagnosis",
    "presentation",
    "terminal",
    "cli",
}


def imports(path: Path) -> set[str]:
    """First parts below `exporter` of everything that `path` imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "exporter" else [f"exporter.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("exporter.")}
    return found


@pytest.mark.parametrize("stage", FLOW)
def test_a_stage_imports_only_earlier_ones(stage: str) -> None:
    allowed = BOTTOM | set(FLOW[: FLOW.index(stage) + 1])
    files = list((PACKAGE / stage).rglob("*.py"))
    assert files
    for path in files:
        assert imports(path) <= allowed, path


def test_the_bottom_imports_only_the_bottom() -> None:
    for name in BOTTOM:
        assert imports(PACKAGE / f"{name}.py") <= BOTTOM


def test_every_file_has_its_place_in_the_flow() -> None:
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and list(path.glob("*.py"))}
    assert files == BOTTOM | TOP
    assert folders == {*FLOW, "commands"}


def test_only_the_command_line_prints() -> None:
    for path in PACKAGE.rglob("*.py"):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        prints = any(isinstance(call, ast.Name) and call.id == "print" for call in calls)
        allowed = ("cli.py", "commands/output.py", "report/schema.py")
        assert not prints or path.relative_to(PACKAGE).as_posix() in allowed, path


def test_a_native_export_of_hashed_weights_does_not_wait_for_torch(tmp_path: Path) -> None:
    """torch and transformers take longer to import than the export takes as a whole; adapters and values need them."""
    tiny_model(tmp_path, torch.float16)
    export(tmp_path)
    code = """
import sys
from exporter.graph.export import export
export(sys.argv[1], target=("cpu", "cuda"))
print(*{"torch", "transformers", "peft", "scipy"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
