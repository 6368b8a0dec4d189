"""Merges in forked processes that can be killed anywhere, a fifth of a second each instead of ten.

A server has imported everything and run no operation of torch, whose threads a fork would lose; it forks once for each
job. `Forks` starts it and talks to it in lines of JSON. The job's phase and its calls of the system stand in memory
that both processes see, so that a test knows where a kill fell.
"""

import json
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PHASES = ("planning", "writing", "proving", "publishing", "done")
# What the tests kill before: each changes what another process, or the next run, would see.
CALLS = ("pwrite", "fsync", "preadv", "replace", "unlink")
TIMEOUT = 60.0


@dataclass(frozen=True)
class Ended:
    """code: the exit code, or the negative signal. phase: the last one begun. calls: how often each was made."""

    code: int
    seconds: float
    phase: str
    calls: Mapping[str, int]
    log: str


class Forks:
    """A client of the server. Close it, or use it in a `with`."""

    def __init__(self, directory: Path) -> None:
        self.log = directory / "log"
        self.server = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        self.run({})  # an empty job ends at once: the server is ready

    def run(
        self,
        call: Mapping[str, Any],
        *,
        cli: list[str] | None = None,
        kill_after: float | None = None,
        kill_before: tuple[str, int] | None = None,
        send: tuple[int, str] | None = None,
        write_seconds: float = 0.0,
    ) -> Ended:
        """Call exporter.merge with `call`, or the command line with `cli`, in a process of its own.

        kill_after: seconds. kill_before: the n-th call of one of CALLS. send: a signal once a phase has begun.
        write_seconds: how long each pwrite takes more.
        """
        job = {"call": dict(call), "cli": cli, "kill_after": kill_after, "kill_before": kill_before, "send": send}
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps({**job, "write_seconds": write_seconds, "log": str(self.log)}) + "\n")
        self.server.stdin.flush()
        return Ended(**json.loads(self.server.stdout.readline()), log=self.log.read_text())

    def close(self) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(TIMEOUT)


class _Shared:
    """A phase and counters, in memory that outlives the process that wrote them."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 4 * (1 + len(CALLS)))
        self.lock = threading.Lock()

    def get(self, index: int) -> int:
        return int.from_bytes(self.memory[4 * index : 4 * index + 4], "little")

    def set(self, index: int, value: int) -> None:
        self.memory[4 * index : 4 * index + 4] = value.to_bytes(4, "little")

    def count(self, name: str) -> int:
        with self.lock:
            index = 1 + CALLS.index(name)
            self.set(index, self.get(index) + 1)
            return self.get(index)


def serve() -> None:
    import torch
    import transformers

    import exporter
    from exporter import cli
    from exporter.merging import merge

    torch.set_num_threads(1)
    _ = transformers.GPT2LMHeadModel, exporter.merge, cli.main, merge.merge  # imported here, once
    for line in sys.stdin:
        job, shared = json.loads(line), _Shared()
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            _child(job, shared)
        status = _wait(child, job, shared, began)
        calls = {name: shared.get(1 + index) for index, name in enumerate(CALLS)}
        seconds = time.monotonic() - began
        answer = {"code": status, "seconds": seconds, "phase": PHASES[shared.get(0)], "calls": calls}
        print(json.dumps(answer), flush=True)


def _wait(child: int, job: Mapping[str, Any], shared: _Shared, began: float) -> int:
    kill_after, send = job["kill_after"], job["send"]
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        elapsed = time.monotonic() - began
        if (kill_after is not None and elapsed >= kill_after) or elapsed > TIMEOUT:
            os.kill(child, signal.SIGKILL)
        if send is not None and shared.get(0) == PHASES.index(send[1]):
            os.kill(child, send[0])
            send = None
        time.sleep(0.0005)


def _child(job: Mapping[str, Any], shared: _Shared) -> None:
    code = 70
    try:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        _watch(shared, job["kill_before"], job["write_seconds"])
        code = _work(job)
        shared.set(0, PHASES.index("done"))
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 70
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _work(job: Mapping[str, Any]) -> int:
    import exporter
    from exporter import cli
    from exporter.errors import ExporterError

    if job["cli"] is not None:
        sys.argv = ["exporter", *job["cli"]]
        cli.main()
    try:
        if job["call"]:
            exporter.merge(**job["call"])
    except ExporterError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _watch(shared: _Shared, kill_before: list[Any] | None, write_seconds: float) -> None:
    """Note phases and count calls; die before the call that was asked for, as a process does that is killed there."""
    from exporter.merging import merge, shards

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if [name, shared.count(name)] == kill_before:
                os.kill(os.getpid(), signal.SIGKILL)
            if name == "pwrite" and write_seconds:
                time.sleep(write_seconds)
            return function(*arguments, **keywords)

        return call

    def in_phase(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            shared.set(0, PHASES.index(phase))
            return function(*arguments, **keywords)

        return call

    for name in CALLS:
        owner: Any = Path if name in ("replace", "unlink") else os
        setattr(owner, name, counted(name, getattr(owner, name)))
    for owner, name, phase in (
        (shards, "write_shard", "writing"),
        (shards, "prove_shard", "proving"),
        (merge, "publish_checkpoint", "publishing"),
    ):
        setattr(owner, name, in_phase(phase, getattr(owner, name)))


if __name__ == "__main__":
    serve()
