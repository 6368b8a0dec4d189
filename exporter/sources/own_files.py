"""A model's directory holds its own files: a link that leads out of it would have a stranger's choice read and copied.

`chat_template.jinja -> ~/.ssh/id_rsa` in a downloaded model would otherwise end up in the merged checkpoint.
"""

import os
import stat
from pathlib import Path

from exporter.errors import InputRefused

# What some command reads out of a model's or a bundle's directory.
SUFFIXES = (".json", ".safetensors", ".bin", ".txt", ".model", ".jinja", ".md", ".onnx", ".onnx_adapter", ".data")


def own_roots(directory: Path) -> list[Path]:
    """Where the files of a model's directory lie: in it and, for a snapshot of the hub's cache, in the blobs beside."""
    real = Path(os.path.realpath(directory))
    return [real, real.parent.parent / "blobs"] if real.parent.name == "snapshots" else [real]


def require_own_files(directory: Path) -> None:
    """InputRefused if a file that could be read from `directory` is a link out of it, a pipe, a socket or a device.

    A snapshot of the hub's cache links into the blobs beside it, and into nothing else.
    """
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except NotADirectoryError:
        return
    except OSError as error:
        raise InputRefused(
            f"{directory} cannot be listed: {error.strerror}", expected="a directory that may be read"
        ) from error
    roots = own_roots(directory)
    for entry in entries:
        if entry.name.endswith(SUFFIXES):
            _require_own(entry, roots)


def _require_own(entry: os.DirEntry[str], roots: list[Path]) -> None:
    kind = entry.stat(follow_symlinks=False).st_mode
    if stat.S_ISLNK(kind):
        target = Path(os.path.realpath(entry.path))
        if not any(target.is_relative_to(root) for root in roots):
            raise InputRefused(
                f"{entry.path} is a link that leads out of its directory",
                expected="files of the directory's own, or a snapshot of the hub's cache",
                todo="put a copy of the file in its place (cp --dereference) if you trust where the link leads",
            )
        if not target.exists():
            return
        kind = target.stat().st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        raise InputRefused(f"{entry.path} is a pipe, a socket or a device", expected="a file", todo="remove it")
