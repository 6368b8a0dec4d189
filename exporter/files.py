"""Writing without ever leaving something half-written under a final name."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from exporter.errors import EnvironmentLacking, UsageError

LOCK = ".exporter.lock"
BLOCK = 4 << 20


def partial_path(final: Path) -> Path:
    """Where `final` is written before it is complete: no loader takes this name for a model file."""
    return final.with_name(f".{final.name}.partial")


def sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(partial: Path, final: Path) -> None:
    """Make a complete file visible: its bytes reach the disk before its name does."""
    handle = os.open(partial, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    partial.replace(final)
    sync_directory(final.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Readers of `path` see the old bytes or all of the new ones."""
    partial = partial_path(path)
    partial.write_bytes(data)
    publish(partial, path)


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def lock_directory(directory: Path) -> Iterator[None]:
    """Hold `directory` (made if missing) against a second writer. A killed process frees it and leaves the lock file.

    Raises UsageError when another process holds it, EnvironmentLacking when it cannot be written.
    """
    handle = _open_lock(directory)
    try:
        yield
    finally:
        (directory / LOCK).unlink(missing_ok=True)
        os.close(handle)


def _open_lock(directory: Path) -> int:
    while True:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            handle = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except (FileExistsError, NotADirectoryError) as error:
            raise UsageError(f"{directory} is a file", expected="a directory", todo="choose another --out") from error
        except OSError as error:
            raise EnvironmentLacking(
                f"cannot write into {directory}: {error.strerror}", todo="choose a writable --out"
            ) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise UsageError(
                f"{directory} is being written by another exporter process",
                expected="one writer at a time",
                todo="wait for it to end, or choose another --out",
            ) from error
        if os.fstat(handle).st_nlink:
            return handle
        os.close(handle)  # its last holder removed the file between our open and our lock


@contextmanager
def removed_if_empty(directory: Path) -> Iterator[None]:
    """On an error, take away `directory` if it did not exist before and nothing stands in it."""
    existed = directory.exists()
    try:
        yield
    except BaseException:
        if not existed and directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()
        raise


def nearest_existing(path: Path) -> Path:
    """The deepest part of `path` that exists: where its bytes would go."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def require_free_space(directory: Path, needed: int, purpose: str) -> None:
    """Raise EnvironmentLacking unless `needed` bytes are free where `directory` is or would be."""
    free = shutil.disk_usage(nearest_existing(directory)).free
    if free < needed:
        raise EnvironmentLacking(
            f"{purpose} needs {human_bytes(needed)} in {directory}, and {human_bytes(free)} are free",
            todo="free some space, or choose an output on another disk",
        )


def human_bytes(count: float) -> str:
    """A size for people, in decimal units: 13.3 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
