"""One good model of every kind of file that a command reads; a case damages a copy of it."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import exporter
from tests.pairs import as_bin, gpt2_config, make_pair

PROMPTS = '{"instruction": "Name a colour.", "output": "Red is a colour."}\n' * 2
SPEC = """[base]
source = "base"
[adapter]
source = "adapter"
[prompt]
template = "alpaca"
[output]
dir = "out"
"""


@dataclass(frozen=True)
class Tree:
    """The files of one case; `outside` is the directory that no command may touch."""

    root: Path
    outside: Path

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def merged(self) -> Path:
        return self.root / "merged"

    @property
    def int8(self) -> Path:
        return self.root / "int8"

    @property
    def separate(self) -> Path:
        return self.root / "separate"

    @property
    def out(self) -> Path:
        return self.root / "out"

    def commands(self) -> dict[str, list[object]]:
        """Every command that reads a model, by the name that the cases give it."""
        pair: list[object] = ["--base", self.base, "--adapter", self.adapter]
        ask = ["--max-new-tokens", 2]
        return {
            "inspect": ["inspect", *pair],
            "merge": ["merge", *pair, "--out", self.out],
            "export": ["export", self.base, "--out", self.out, "--precision", "int8"],
            "export merged": ["export", self.merged],
            "export separate": ["export", *pair, "--adapters", "separate", "--out", self.out],
            "export int8-exact": ["export", *pair, "--precision", "int8-exact", "--out", self.out],
            "capture": ["capture", *pair, "--out", self.root / "captured", "--prompts", self.root / "prompts.jsonl"],
            "verify": ["verify", *pair, "--bundle", self.merged, "--prompts", self.root / "prompts.jsonl"],
            "verify int8": ["verify", *pair, "--bundle", self.int8],
            "verify reference": ["verify", *pair, "--bundle", self.merged, "--reference", self.root / "reference"],
            "unmerge": ["unmerge", self.merged, "--adapter", self.adapter, "--base", self.base, "--out", self.out],
            "verify-manifest": ["verify-manifest", self.merged],
            "generate": ["generate", self.merged, "--instruction", "Hi", *ask],
            "generate prompt": ["generate", self.merged, "--prompt", "Hi", *ask],
            "generate int8": ["generate", self.int8, "--prompt", "Hi", *ask],
            "generate separate": ["generate", self.separate, "--prompt", "Hi", "--adapter", "adapter", *ask],
            "serve": ["serve", self.merged, "--port", 0],
            "run": ["run", self.root / "spec.toml"],
        }


def make_material(root: Path) -> Path:
    """A base of one layer, its adapter, and everything that is made of them, in `root`."""
    pair = make_pair(root, gpt2_config(n_layer=1, n_embd=32, n_head=4))
    (pair.base / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    merged = exporter.merge(base=pair.base, adapter=pair.adapter, out=root / "merged").directory
    exporter.export(merged, precision=["native", "int8"])
    exporter.export(base=pair.base, adapter=pair.adapter, adapters="separate", out=root / "separate")
    exporter.capture(base=pair.base, adapter=pair.adapter, out=root / "reference", prompts=_prompts(root))
    (root / "spec.toml").write_text(SPEC)
    return root


def _prompts(root: Path) -> Path:
    (root / "prompts.jsonl").write_text(PROMPTS)
    return root / "prompts.jsonl"


def copy_material(material: Path, root: Path, outside: Path) -> Tree:
    shutil.copytree(material, root)
    return Tree(root, outside)


def base_as_bin(tree: Tree) -> Path:
    """The base's weights as pytorch_model.bin; the file."""
    as_bin(tree.base)
    return tree.base / "pytorch_model.bin"
