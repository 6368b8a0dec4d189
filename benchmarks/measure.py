"""Run commands as whole processes, one after the other, and keep what the kernel accounts: wall, CPU, peak memory."""

import os
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Run:
    """wall, cpu: seconds. peak: bytes of the process's largest resident set, without its page cache."""

    wall: float
    cpu: float
    peak: int


def run(command: Sequence[str | Path], environment: dict[str, str] | None = None) -> Run:
    """Run `command` to its end. RuntimeError with its standard error if it fails."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | (environment or {}),
    )
    assert process.stderr is not None
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stderr.close()
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} gave {process.returncode}: {error.decode()[-2000:]}")
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def drop_page_cache(files: Sequence[Path]) -> str:
    """Make the next read of `files` cold. Returns how: as root for the whole machine, else for these files alone."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
        return "drop_caches"
    except OSError:
        for file in files:
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
        return "fadvise"


def read_all(files: Sequence[Path]) -> None:
    """Make the next read of `files` warm, as far as they fit into memory."""
    buffer = bytearray(16 << 20)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def median_ratio(runs: Sequence[Run], baseline: Sequence[Run]) -> float:
    """The median of the wall times' ratios, pair by pair: a machine whose speed drifts changes both of a pair."""
    return statistics.median(one.wall / other.wall for one, other in zip(runs, baseline, strict=True))
