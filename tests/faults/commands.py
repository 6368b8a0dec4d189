"""The commands of the matrix on one small pair: how each is called, and what it has made."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.manifest import MANIFEST

PARITY = {"verification.json": "}", "junit.xml": "</testsuites>", "summary.md": "", "report.html": "</html>"}


@dataclass(frozen=True)
class Inputs:
    """A directory with base/, adapter/, merged/, int8/ and prompts.jsonl."""

    root: Path

    def copied(self, root: Path) -> "Inputs":
        shutil.copytree(self.root, root)
        write_spec(root)  # it names the inputs
        return Inputs(root)


@dataclass(frozen=True)
class Command:
    """arguments: of the command line, for these inputs and this output directory. reads: weights that it opens.

    copies: the output is a copy of the merged checkpoint to begin with. writes: it has an output directory; a command
    without one answers in JSON. varying: that answer's keys whose values differ from run to run.
    """

    arguments: Callable[[Path, Path], list[str | Path]]
    reads: str
    copies: bool = False
    writes: bool = True
    varying: tuple[str, ...] = ()

    def begin(self, inputs: Inputs, out: Path) -> None:
        if self.copies:
            shutil.copytree(inputs.root / "merged", out)

    def line(self, inputs: Inputs, out: Path) -> list[str]:
        return [*map(str, self.arguments(inputs.root, out)), "--quiet"]

    def answer(self, stdout: str) -> Any:
        return _without(json.loads(stdout), self.varying)


def listed(stdout: str) -> str:
    """What is wrong, as the answers of `inspect` and `doctor` list it."""
    answer = json.loads(stdout)
    return "\n".join(answer.get("problems") or [one["detail"] for one in answer["checks"] if not one["ok"]])


def _without(value: Any, keys: tuple[str, ...]) -> Any:
    if isinstance(value, list):
        return [_without(item, keys) for item in value]
    if isinstance(value, dict):
        return {key: _without(item, keys) for key, item in value.items() if key not in keys}
    return value


def _pair(root: Path) -> list[str | Path]:
    return ["--base", root / "base", "--adapter", root / "adapter"]


BASE, MERGED, INT8 = "base/model.safetensors", "merged/model.safetensors", "int8/weights.safetensors"
COMMANDS: Mapping[str, Command] = {
    "merge": Command(
        lambda root, out: ["merge", *_pair(root), "--out", out, "--template", "alpaca", "--shard-size", "100kB"], BASE
    ),
    "export native": Command(lambda root, out: ["export", out], MERGED, copies=True),
    "export int8": Command(
        lambda root, out: ["export", root / "merged", "--precision", "int8", "--out", out], MERGED
    ),
    "export int4": Command(
        lambda root, out: ["export", root / "merged", "--precision", "int4", "--out", out], MERGED
    ),
    "export separate": Command(
        lambda root, out: ["export", *_pair(root), "--adapters", "separate", "--out", out], BASE
    ),
    "export int8-exact": Command(
        lambda root, out: ["export", *_pair(root), "--precision", "int8-exact", "--out", out], BASE
    ),
    "verify": Command(
        lambda root, out: ["verify", *_pair(root), "--bundle", root / "int8", "--prompts", root / "prompts.jsonl",
                           "--report", out],
        BASE,
    ),
    "capture": Command(
        lambda root, out: ["capture", *_pair(root), "--prompts", root / "prompts.jsonl", "--template", "alpaca",
                           "--out", out / "reference.safetensors"],
        BASE,
    ),
    "run": Command(lambda root, out: ["run", root / "run.toml", "--out", out], BASE),
    "unmerge": Command(
        lambda root, out: ["unmerge", root / "merged", "--adapter", root / "adapter", "--base", root / "base",
                           "--out", out],
        MERGED,
    ),
    "generate": Command(
        lambda root, out: ["generate", root / "int8", "--prompt", "Once upon", "--max-new-tokens", "8", "--json"],
        INT8,
        writes=False,
        varying=("bundle",),
    ),
    "inspect": Command(
        lambda root, out: ["inspect", *_pair(root), "--json"], BASE, writes=False, varying=("source", "seconds")
    ),
    "verify-manifest": Command(
        lambda root, out: ["verify-manifest", root / "int8", "--json"], INT8, writes=False, varying=("directory",)
    ),
    "doctor": Command(lambda root, out: ["doctor", "--json"], "", writes=False, varying=("detail",)),
}  # fmt: skip


def write_spec(root: Path) -> None:
    (root / "run.toml").write_text(
        f"""
[base]
source = {json.dumps(str(root / "base"))}
[adapter]
source = {json.dumps(str(root / "adapter"))}
[prompt]
template = "alpaca"
[export]
precisions = ["native", "int4"]
[verify]
prompts = {json.dumps(str(root / "prompts.jsonl"))}
[output]
dir = "unused"
"""
    )


def made_by(out: Path) -> dict[str, str]:
    """What stands under a final name, by its content; accounts and reports without times and places."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    named = {path.relative_to(out): path for path in files}
    return {str(name): _content(path) for name, path in named.items() if not any(p[0] == "." for p in name.parts)}


def _content(path: Path) -> str:
    data = path.read_bytes()
    if path.name == MANIFEST:
        stages = json.loads(data)["stages"]
        listed = {stage: _listed(section.get("files", {})) for stage, section in stages.items()}
        return json.dumps(listed, sort_keys=True)
    if path.name in PARITY:
        text = data.decode().rstrip()
        assert text.endswith(PARITY[path.name]), f"{path} is cut off"
        assert text
        return json.loads(text)["verdict"] if path.suffix == ".json" else "whole"
    return hashlib.sha256(data).hexdigest()


def _listed(files: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
    varying = [name for name in files if Path(name).name in PARITY]  # they tell the time
    return {name: name if name in varying else [entry["size"], entry["sha256"]] for name, entry in files.items()}


def half_made(out: Path, wanted: Mapping[str, str], before: Mapping[str, str]) -> list[str]:
    """What has a final name and is neither the old nor the whole new content; what a manifest lists in vain."""
    seen = made_by(out) if os.path.exists(out) else {}  # noqa: PTH110 - a path beyond the kernel's limit is none
    wrong = [
        name
        for name, content in seen.items()
        if content not in (wanted.get(name), before.get(name)) and Path(name).name != MANIFEST
    ]
    for manifest in out.rglob(MANIFEST) if seen else ():
        for section in json.loads(manifest.read_bytes())["stages"].values():
            for name, entry in section.get("files", {}).items():
                file = manifest.parent / name
                if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != entry["sha256"]:
                    wrong.append(f"{name}, as {manifest} lists it")
    return wrong
