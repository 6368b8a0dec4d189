"""Writing without ever leaving something half-written under a final name."""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
    write_partial(path, data)
    publish(partial_path(path), path)


def write_partial(path: Path, data: bytes) -> None:
    """Put `data` on the disk under the partial name of `path`: what is left is a renaming, which takes no space."""
    with partial_path(path).open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


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
        with suppress(OSError):  # whatever ended the work has more to say than a lock file that stays
            (directory / LOCK).unlink(missing_ok=True)
        os.close(handle)


@contextmanager
def disk_errors(directory: Path) -> Iterator[None]:
    """An error of the system while `directory` is written, such as a full disk, as EnvironmentLacking."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOMEM:  # not the disk's
            raise
        raise EnvironmentLacking(
            f"writing into {directory} failed: {error.strerror or error}",
            todo="free disk space or check the disk, then run the same command again: finished parts are kept",
        ) from error


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
    """On an error, take away `directory`, and parents made for it, if they did not exist and nothing stands in them."""
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        with suppress(OSError):  # the first that something stands in, or that was never made
            for path in made:
                path.rmdir()
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
