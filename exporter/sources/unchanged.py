"""Files that must stay as they are while they are read: what was made of half of each of two would be neither."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from exporter.errors import InputRefused

Stamp = tuple[int, int, int]


def watch(files: Iterable[Path]) -> dict[Path, Stamp | None]:
    """Size, time and inode of each file; None where it is gone."""
    return {path: _stamp(path) for path in dict.fromkeys(files)}


def watch_all(directories: Iterable[Path]) -> dict[Path, Stamp | None]:
    """`watch` for every visible file that stands in the directories."""
    found = [path for directory in directories for path in directory.glob("[!.]*")]
    return watch(path for path in found if path.is_file())


def require_unchanged(watched: Mapping[Path, Stamp | None]) -> None:
    """InputRefused if a file is not the one that it was when it was watched first."""
    for path, before in watched.items():
        if _stamp(path) != before:
            raise InputRefused(
                f"{path} changed while it was read",
                expected="files that stay as they are until the command has ended",
                todo="run the same command again when nothing writes there",
            )


def _stamp(path: Path) -> Stamp | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino
