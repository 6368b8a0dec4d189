"""One command as a process of its own, its children with it: what the kernel accounts for all of them."""

import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

INTERVAL = 0.05
PR_SET_PDEATHSIG = 1  # of Linux's prctl
ENDING = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Figures:
    """wall, cpu: seconds. The others: bytes.

    peak: the largest resident set of the whole tree, mapped files included; anonymous: of it, what is not a file's.
    read, written: through calls of the system, so the page cache counts and mapped files do not. from_disk, to_disk:
    what storage had to move.
    """

    wall: float
    cpu: float
    peak: int
    anonymous: int
    read: int
    written: int
    from_disk: int
    to_disk: int


@dataclass(frozen=True)
class Ended:
    """code: the exit code, or the negative signal. out, error: what it printed."""

    code: int
    figures: Figures
    out: str
    error: str


def measure(
    command: Sequence[str | Path],
    *,
    environment: Mapping[str, str] | None = None,
    directory: Path,
    scratch: Path,
    meanwhile: Callable[[subprocess.Popen[bytes]], None] | None = None,
) -> Ended:
    """Run `command` in `directory` to its end.

    `meanwhile` is called once it runs, for a server that has to be asked and stopped. Output goes through files in
    `scratch`. Whatever interrupts this ends the whole tree; the command dies with this process too.
    """
    out, error = scratch / "stdout", scratch / "stderr"
    with out.open("wb") as out_file, error.open("wb") as error_file:
        began = time.perf_counter()
        with _signals_wait():
            process = subprocess.Popen(
                [str(word) for word in command],
                stdout=out_file,
                stderr=error_file,
                env=os.environ | dict(environment or {}),
                cwd=directory,
                start_new_session=True,
                preexec_fn=_begin,
            )
        peaks = _Peaks(process.pid)
        try:
            if meanwhile is not None:
                meanwhile(process)
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie still has its account
            wall = time.perf_counter() - began
            peaks.stop()
            moved = _moved(process.pid)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        except BaseException:
            peaks.stop()
            _end(process)
            raise
    figures = Figures(
        wall=wall,
        cpu=usage.ru_utime + usage.ru_stime,
        peak=peaks.resident,
        anonymous=peaks.anonymous,
        read=moved.get("rchar", 0),
        written=moved.get("wchar", 0),
        from_disk=moved.get("read_bytes", 0),
        to_disk=moved.get("write_bytes", 0),
    )
    return Ended(process.returncode, figures, _text(out), _text(error))


@contextmanager
def _signals_wait() -> Iterator[None]:
    """What a handler raises while Python runs its hooks of a fork is printed and lost: signals come afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin() -> None:
    """In the child, which inherits what is blocked."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _moved(pid: int) -> dict[str, int]:
    """/proc/PID/io, which counts children that were waited for."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def _text(path: Path) -> str:
    return path.read_text(errors="replace")


class _Peaks:
    """Samples the resident memory of a process and its descendants until it is stopped.

    Between two samples each process's own high-water mark counts; ru_maxrss would count what this process held when it
    forked.
    """

    def __init__(self, pid: int) -> None:
        self.resident = self.anonymous = 0
        self._pid, self._stopped = pid, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stopped.wait(INTERVAL):
            held = [resident_of(pid) for pid in self._tree()]
            alone = max((one.get("VmHWM", 0) for one in held), default=0)
            self.resident = max(self.resident, alone, sum(one.get("VmRSS", 0) for one in held))
            self.anonymous = max(self.anonymous, sum(one.get("RssAnon", 0) for one in held))

    def _tree(self) -> list[int]:
        with suppress(psutil.Error):
            return [self._pid, *(child.pid for child in psutil.Process(self._pid).children(recursive=True))]
        return []


def resident_of(pid: int) -> dict[str, int]:
    """The memory lines of /proc/PID/status in bytes; none for a process that is gone."""
    found = {}
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if value.endswith(" kB"):
                found[name] = int(value.removesuffix(" kB")) * 1024
    return found
