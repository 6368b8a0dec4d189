"""A few of the corpus as a user runs them: the command in a process of its own, with a hard limit of memory."""

import resource
import subprocess
import sys
import time

import pytest

from tests.hostile.material import Tree
from tests.hostile.pickles import ARCHIVES, SHELL, in_old_format, in_zip
from tests.hostile.texts import EXHAUSTING, template

MEMORY = 8 << 30  # address space of the whole process: torch and ONNX Runtime alone map some gigabytes
SECONDS = 60  # two cores shared with others; the commands themselves are held to ten in test_corpus.py


def run(tree: Tree, name: str) -> tuple[int, str]:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "exporter.cli", *map(str, tree.commands()[name])],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        cwd=tree.root,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY)),
    )
    assert time.monotonic() - began < SECONDS
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


CASES = {
    "a payload in a zip": (in_zip(SHELL), "merge"),
    "a payload in the old format": (in_old_format(SHELL), "inspect"),
    "a zip bomb": (ARCHIVES["a zip bomb"], "inspect"),
    "a template of 10 GB": (template(EXHAUSTING["a text of 10 GB"]), "generate"),
    "a template without end": (template(EXHAUSTING["nested loops"]), "generate"),
}


@pytest.mark.parametrize("name", CASES)
def test_refused_in_a_process_of_its_own(tree: Tree, name: str) -> None:
    damage, command = CASES[name]
    damage(tree)
    code, said = run(tree, command)
    assert code == 4, said
    assert not list(tree.root.parent.rglob("outside_ran"))


def test_code_beside_the_working_directory_is_not_imported(tree: Tree) -> None:
    """A model's directory is a likely place to work in, and may hold a jinja2.py."""
    for module in ("jinja2", "json", "exporter", "sitecustomize"):
        (tree.merged / f"{module}.py").write_text("import pathlib\npathlib.Path('outside_ran').touch()\n")
    program = "from exporter.prompts import render_chat\n"
    program += "print(render_chat('{{ messages[0].content }}', [{'role': 'user', 'content': 'Hi'}]))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, cwd=tree.merged, timeout=SECONDS
    )
    assert (done.returncode, done.stdout.strip()) == (0, "Hi"), done.stderr
    assert not (tree.merged / "outside_ran").exists()
