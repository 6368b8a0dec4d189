"""Any command of Exporter in a forked process, with a fault put into it: a fifth of a second each instead of ten.

A server has imported everything and run no operation of torch, whose threads a fork would lose; it forks once for each
job. What a job called is counted in memory that both processes see, so that a test knows where a kill fell.
"""

import itertools
import json
import mmap
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SYSTEM = ("pwrite", "fsync", "preadv", "replace", "unlink", "read_bytes")
STAGES = ("write_shard", "prove_shard", "publish_checkpoint")  # of a merge
CALLS = (*SYSTEM, *STAGES)
TIMEOUT = 300.0
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Fault:
    """What goes wrong. call, number: before the number-th call of one of CALLS.

    kill_after: seconds until SIGKILL. signal: sent at the call. error: that call and all later ones fail with it.
    replace: (new, old): the file `new` is renamed to `old` at the call. memory: bytes of address space that are left.
    clock: time.time goes backwards. hide_full: the disk is said to have room. scratch: where temporary files go.
    slow: seconds that each pwrite takes more.
    """

    call: str = ""
    number: int = 0
    kill_after: float | None = None
    signal: int = 0
    error: int = 0
    replace: tuple[str, str] | None = None
    memory: int = 0
    clock: bool = False
    hide_full: bool = False
    scratch: str = ""
    slow: float = 0.0


NONE = Fault()


@dataclass(frozen=True)
class Ended:
    """code: the exit code, or the negative signal. calls: how often each was made. log: stderr. out: stdout."""

    code: int
    seconds: float
    calls: Mapping[str, int]
    log: str
    out: str

    @property
    def message(self) -> str:
        """The error's first line, without the word."""
        lines = [line for line in self.log.splitlines() if line.startswith("error: ")]
        return lines[0].removeprefix("error: ") if lines else ""


class Forks:
    """A client of the server. Close it when done."""

    def __init__(self, directory: Path) -> None:
        self.log, self.out = directory / "log", directory / "stdout"
        self.server = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        self.run(["version"])  # the server is ready

    def run(self, command: Sequence[str], fault: Fault = NONE, directory: Path | None = None) -> Ended:
        """`exporter` with these words, in `directory` or in the repository."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        job = {"command": list(command), "fault": asdict(fault), "log": str(self.log), "out": str(self.out)}
        job["directory"] = str(directory or ROOT)
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        answer = json.loads(self.server.stdout.readline())
        return Ended(**answer, log=self.log.read_text(), out=self.out.read_text())

    def close(self) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(TIMEOUT)


class _Counts:
    """How often each call was made, in memory that outlives the process that wrote it."""

    def __init__(self) -> None:
        self.memory, self.lock = mmap.mmap(-1, 4 * len(CALLS)), threading.Lock()

    def get(self, name: str) -> int:
        at = 4 * CALLS.index(name)
        return int.from_bytes(self.memory[at : at + 4], "little")

    def count(self, name: str) -> int:
        with self.lock:
            now, at = self.get(name) + 1, 4 * CALLS.index(name)
            self.memory[at : at + 4] = now.to_bytes(4, "little")
            return now


def serve() -> None:
    import bitsandbytes
    import onnxruntime
    import torch
    import transformers

    import exporter
    from exporter import cli
    from exporter.graph import quantize

    torch.set_num_threads(1)
    _ = transformers.GPT2LMHeadModel, bitsandbytes.nn, onnxruntime.InferenceSession, cli.main, quantize.REACH
    for name in exporter.FUNCTIONS:
        getattr(exporter, name)
    for line in sys.stdin:
        job, counts = json.loads(line), _Counts()
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            _child(job, Fault(**job["fault"]), counts)
        code = _wait(child, job["fault"]["kill_after"], began)
        calls = {name: counts.get(name) for name in CALLS}
        print(json.dumps({"code": code, "seconds": time.monotonic() - began, "calls": calls}), flush=True)


def _wait(child: int, kill_after: float | None, began: float) -> int:
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        elapsed = time.monotonic() - began
        if (kill_after is not None and elapsed >= kill_after) or elapsed > TIMEOUT:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.0005)


def _child(job: Mapping[str, Any], fault: Fault, counts: _Counts) -> None:
    code = 70
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a job that a shell runs in the background
        for descriptor, path in ((1, job["out"]), (2, job["log"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(job["directory"])
        from exporter import cli

        sys.argv = ["exporter", *job["command"]]
        _put_in(fault, counts)
        cli.main()
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 70
    except BaseException as error:
        os.write(2, f"Traceback: {error!r}\n".encode())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _put_in(fault: Fault, counts: _Counts) -> None:
    from exporter.merging import merge, shards

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            number = counts.count(name)
            if name == fault.call and number == fault.number:
                if fault.signal:
                    os.kill(os.getpid(), fault.signal)
                if fault.replace:
                    Path(fault.replace[0]).rename(fault.replace[1])
            if name == fault.call and fault.error and number >= fault.number:
                raise OSError(fault.error, os.strerror(fault.error))
            if name == "pwrite":
                time.sleep(fault.slow)
            return function(*arguments, **keywords)

        return call

    for name in CALLS:
        owner: Any = Path if name in ("replace", "unlink", "read_bytes") else os
        if name in STAGES:
            owner = merge if name == "publish_checkpoint" else shards
        setattr(owner, name, watched(name, getattr(owner, name)))
    if fault.hide_full:
        usage = shutil.disk_usage("/")
        shutil.disk_usage = lambda _: usage._replace(free=1 << 50)
    if fault.clock:
        now = itertools.count(2_000_000_000.0, -60.0)
        time.time = lambda: next(now)
    if fault.scratch:
        tempfile.tempdir = fault.scratch
    if fault.memory:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + fault.memory, used + fault.memory))


if __name__ == "__main__":
    serve()
