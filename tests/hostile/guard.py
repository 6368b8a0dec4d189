"""What no input may cause, watched while a command runs in this process: code, files outside, sockets, hangs, bombs.

Python's audit events see every file, process and socket that Python code opens; inotify sees the forbidden directory
for native code too (safetensors, tokenizers and ONNX Runtime open files of their own).
"""

import ctypes
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers

from tests.limits import limits

IN_ACCESS, IN_MODIFY, IN_OPEN, IN_CREATE, IN_DELETE = 0x1, 0x2, 0x20, 0x100, 0x200
NONBLOCK_CLOEXEC = 0o2004000
FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen", "pty.spawn",
    "pickle.find_class", "socket.connect", "socket.bind", "socket.getaddrinfo", "webbrowser.open", "ctypes.dlopen",
    "code.__new__", "function.__new__",
)  # fmt: skip
RENDERER = ["-P", "-m", "exporter.templates"]  # our own process, which renders chat templates
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
ROOT = Path(__file__).parents[2]
# Where the interpreter, its packages and the system's own tables lie.
PLACES = (sys.prefix, sys.base_prefix, ROOT, Path(transformers.__file__).parents[1], "/usr", "/lib")
TABLES = ("/proc", "/sys", "/dev/null", "/dev/urandom", "/etc/localtime", "/etc/mime.types")
READABLE = (*(os.path.realpath(place) for place in PLACES), *TABLES)


class _Watch:
    """The events of the command that is running; None between commands. An audit hook cannot be removed."""

    def __init__(self) -> None:
        self.events: list[tuple[str, tuple[Any, ...]]] | None = None
        self.importing = 0
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.events is not None and (event == "open" or event in FORBIDDEN or event in CHANGES):
            self.events.append((event, arguments))


_watch = _Watch()


class Outside:
    """A directory that nobody may open, read or change a file of; asked of the kernel."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        libc = ctypes.CDLL(None, use_errno=True)
        self._handle = libc.inotify_init1(NONBLOCK_CLOEXEC)
        mask = IN_ACCESS | IN_MODIFY | IN_OPEN | IN_CREATE | IN_DELETE
        if self._handle < 0 or libc.inotify_add_watch(self._handle, os.fsencode(directory), mask) < 0:
            raise OSError(ctypes.get_errno(), "inotify")

    def touched(self) -> bool:
        """True if something happened there since the last call."""
        try:
            return bool(os.read(self._handle, 1 << 16))
        except BlockingIOError:
            return False

    def close(self) -> None:
        os.close(self._handle)


@contextmanager
def guarded(own: Path, outside: Outside) -> Iterator[list[str]]:
    """Run a command inside; afterwards the list says what it did that no input may cause. `own`: its directory."""
    violations: list[str] = []
    outside.touched()
    _watch.events = events = []
    try:
        with limits():
            yield violations
    finally:
        _watch.events = None
        violations += [text for event in events if (text := _violation(event, own))]
        if outside.touched():
            violations.append(f"something in {outside.directory} was opened or changed")


def _violation(event: tuple[str, tuple[Any, ...]], own: Path) -> str:
    name, arguments = event
    if name == "subprocess.Popen" and list(arguments[1])[1:] == RENDERER:
        return ""
    if name in ("socket.getaddrinfo", "socket.bind") and _is_servers_own(arguments):
        return ""
    if name in FORBIDDEN:
        return f"{name} {str(arguments)[:200]}"
    if name == "open":
        path, mode, flags = arguments
        if isinstance(path, int) or path is None:
            return ""
        writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or any(
            letter in (mode or "") for letter in "wax+"
        )
        return "" if _allowed(path, own, writes) else f"open {os.fsdecode(path)} {mode} {flags}"
    paths = [path for path in arguments if isinstance(path, str | bytes | os.PathLike)]
    return "" if all(_allowed(path, own, True) for path in paths) else f"{name} {arguments}"


def _is_servers_own(arguments: tuple[Any, ...]) -> bool:
    """The port that the command line asks `serve` for (0: any) on loopback; taken before a bundle is looked at."""
    return arguments[:2] == ("127.0.0.1", 0) or arguments[1] == ("127.0.0.1", 0)


def _allowed(path: Any, own: Path, writes: bool) -> bool:
    real = os.path.realpath(os.path.join(os.getcwd(), os.fsdecode(path)))  # noqa: PTH109, PTH118
    scratch = os.path.join(os.path.realpath(tempfile.gettempdir()), "exporter-")  # noqa: PTH118
    if real.startswith((str(own) + "/", scratch)) or real in (str(own), "/dev/null"):
        return True
    return not writes and real.startswith(READABLE)
