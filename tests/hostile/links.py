"""Links out of the directory, pipes, devices and directories under the names of files."""

import os
from collections.abc import Callable
from pathlib import Path

from tests.hostile.case import PAIR, Case
from tests.hostile.material import Tree

SECRET = "secret"


def secret(tree: Tree, source: Path) -> Path:
    """A file outside that would do very well in place of `source`: it is refused for where it lies alone."""
    target = tree.outside / SECRET
    target.write_bytes(source.read_bytes() if source.exists() else b"{{ 'a secret' }}")
    return target


def link(place: str, *, relative: bool = False) -> Callable[[Tree], object]:
    def damage(tree: Tree) -> None:
        path = tree.root / place
        target = secret(tree, path)
        path.unlink(missing_ok=True)
        path.symlink_to(os.path.relpath(target, path.parent) if relative else target)

    return damage


def chain(place: str) -> Callable[[Tree], object]:
    """A link to a link beside it that leads out."""

    def damage(tree: Tree) -> None:
        path = tree.root / place
        (path.parent / "innocent").symlink_to(secret(tree, path))
        path.unlink()
        path.symlink_to("innocent")

    return damage


def to(place: str, target: str) -> Callable[[Tree], object]:
    def damage(tree: Tree) -> None:
        (tree.root / place).unlink(missing_ok=True)
        (tree.root / place).symlink_to(target)

    return damage


def pipe(place: str) -> Callable[[Tree], object]:
    """Opening it for reading waits for ever."""

    def damage(tree: Tree) -> None:
        (tree.root / place).unlink(missing_ok=True)
        os.mkfifo(tree.root / place)

    return damage


def directory(place: str) -> Callable[[Tree], object]:
    def damage(tree: Tree) -> None:
        (tree.root / place).unlink(missing_ok=True)
        (tree.root / place).mkdir()

    return damage


def snapshot(tree: Tree) -> None:
    """Dressed as a snapshot of the hub's cache, whose links into blobs/ are followed; this one leads past them."""
    blobs, place = tree.root / "cache/blobs", tree.root / "cache/snapshots/c0ffee"
    place.mkdir(parents=True)
    blobs.mkdir()
    for path in tree.base.iterdir():
        path.rename(blobs / path.name)
        (place / path.name).symlink_to(f"../../blobs/{path.name}")
    (blobs / "config.json").rename(tree.outside / SECRET)
    (blobs / "config.json").symlink_to(tree.outside / SECRET)
    tree.base.rmdir()
    tree.base.symlink_to(place)


BASE = ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors")
NEEDED = ("config.json", "model.safetensors")
BUNDLE = ("model.onnx", "model.safetensors", "config.json", "tokenizer.json", "exporter.json", "genai_config.json")
OUTWARD = "is a link that leads out"
SPECIAL = "a pipe, a socket or a device"
CASES = [
    *(Case(f"link: base/{name}", link(f"base/{name}"), (*PAIR, "export"), says=OUTWARD) for name in BASE),
    *(
        Case(f"link: adapter/{name}", link(f"adapter/{name}"), PAIR, says=OUTWARD)
        for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json", "README.md")
    ),
    *(
        Case(f"link: merged/{name}", link(f"merged/{name}"),
             ("generate", "serve", "export merged", "verify", "verify-manifest", "unmerge"), says=OUTWARD)
        for name in BUNDLE
    ),
    Case("link: int8/weights.safetensors", link("int8/weights.safetensors"), ("generate int8", "verify int8"),
         says=OUTWARD),
    Case("link: an adapter at run time", link("separate/adapter.onnx_adapter"), ("generate separate",), says=OUTWARD),
    Case("link: relative", link("base/config.json", relative=True), PAIR, says=OUTWARD),
    Case("link: by way of a link", chain("base/chat_template.jinja"), PAIR, says=OUTWARD),
    Case("link: past the blobs of a snapshot", snapshot, PAIR, says=OUTWARD),
    Case("link: to the root of everything", to("base/README.md", "/"), PAIR, says=OUTWARD),
    Case("link: to /dev/zero", to("base/config.json", "/dev/zero"), PAIR, says=OUTWARD),
    Case("link: to nothing outside", to("adapter/README.md", "/nowhere/at/all"), PAIR, says=OUTWARD),
    Case("link: to itself", to("base/config.json", "config.json"), ("inspect", "merge")),
    *(Case(f"pipe: base/{name}", pipe(f"base/{name}"), (*PAIR, "export"), says=SPECIAL) for name in BASE),
    *(Case(f"pipe: merged/{name}", pipe(f"merged/{name}"), ("generate", "verify", "verify-manifest"), says=SPECIAL)
      for name in BUNDLE),
    Case("pipe: the spec", pipe("spec.toml"), ("run",)),
    Case("pipe: the prompts", pipe("prompts.jsonl"), ("capture", "verify")),
    Case("pipe: the reference", pipe("reference"), ("verify reference",)),
    *(Case(f"directory: base/{name}", directory(f"base/{name}"), ("inspect", "merge", "export")) for name in NEEDED),
    *(Case(f"directory: adapter/{name}", directory(f"adapter/{name}"), ("inspect", "merge"))
      for name in ("adapter_config.json", "adapter_model.safetensors")),
    *(Case(f"directory: merged/{name}", directory(f"merged/{name}"), ("generate", "verify"))
      for name in ("model.onnx", "model.safetensors", "exporter.json", "tokenizer.json")),
    Case("directory: the spec", directory("spec.toml"), ("run",)),
    Case("directory: the prompts", directory("prompts.jsonl"), ("capture", "verify")),
    Case("directory: the reference", directory("reference"), ("verify reference",)),
]  # fmt: skip
