"""Every case of the corpus against every command that reads its kind of file: refused, in words, and nothing else."""

import shutil

import pytest

from tests.hostile import bundles, cards, json_files, links, pickles, requests, safetensors_headers, texts
from tests.hostile.case import Case
from tests.hostile.conftest import CommandLine
from tests.hostile.guard import Outside
from tests.hostile.material import Tree

MODULES = (safetensors_headers, pickles, json_files, links, texts, cards, requests, bundles)
CASES: list[Case] = [case for module in MODULES for case in module.CASES]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_refused(case: Case, tree: Tree, outside: Outside, command_line: CommandLine) -> None:
    case.damage(tree)
    for name in case.commands:
        code, said, violations = command_line.run(tree, outside, tree.commands()[name])
        assert not violations, name
        assert "an unexpected " not in said, (name, said)
        assert "Traceback" not in said, (name, said)
        assert code in case.codes, (name, said)
        assert said.strip(), name
        if code:
            assert case.says in said, (name, said)
            left = [path.name for path in tree.out.iterdir()] if tree.out.is_dir() else []
            assert not [name for name in left if not name.startswith(".")], (name, "left something behind")
        shutil.rmtree(tree.out, ignore_errors=True)


def test_there_are_at_least_200_of_them() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 200
