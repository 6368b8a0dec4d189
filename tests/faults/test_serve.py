"""A server whose bundle, port, memory or life is taken away."""

import errno
import json
import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults.commands import Inputs
from tests.faults.conftest import ending, matrix, remount, require
from tests.forked import NONE, TIMEOUT, Ended, Fault, Forks

ASKED = {"model": "it", "prompt": "Once upon", "max_tokens": 60, "temperature": 0}


class Serving:
    """A server under way. ended: how it ended, once it has."""

    def __init__(self, client: httpx.Client, pid: int) -> None:
        self.client, self.pid = client, pid
        self.terminated = False
        self.ended: Ended | None = None

    def text(self) -> str:
        answer = self.client.post("/v1/completions", json=ASKED)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    def terminate(self) -> None:
        if not self.terminated:  # a second signal would be the user's impatience
            os.kill(self.pid, signal.SIGTERM)
        self.terminated = True

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.terminated = True


@contextmanager
def serving(forks: Forks, bundle: Path, fault: Fault = NONE) -> Iterator[Serving]:
    """Terminated at the end, where it still runs."""
    ended: list[Ended] = []
    forks.out.write_text("")
    command = ["serve", f"it={bundle}", "--port", "0", "--threads", "1", "--json", "--quiet"]
    thread = threading.Thread(target=lambda: ended.append(forks.run(command, fault)))
    thread.start()
    ready = _ready(forks, thread)
    server = Serving(httpx.Client(base_url=ready["url"], timeout=TIMEOUT), ready["pid"])
    try:
        yield server
    finally:
        server.terminate()
        thread.join()
        server.ended = ended[0]


def _ready(forks: Forks, thread: threading.Thread) -> dict[str, Any]:
    while thread.is_alive():
        text = forks.out.read_text()
        if text.endswith("}\n"):
            return json.loads(text)
        thread.join(0.01)
    raise AssertionError(forks.log.read_text())


@pytest.fixture
def bundle(inputs: Inputs, tmp_path: Path) -> Path:
    return Path(shutil.copytree(inputs.root / "int8", tmp_path / "int8"))


def begun(forks: Forks, bundle: Path, fault: Fault, port: int = 0) -> Ended:
    return forks.run(["serve", f"it={bundle}", "--port", str(port), "--threads", "1", "--quiet"], fault)


def refused(ended: Ended) -> str:
    assert ended.code == 5, (ended.code, ended.log)
    assert "Traceback" not in ended.log
    assert ended.log.count("error: ") == 1, ended.log
    return ended.message


def test_a_signal_in_the_middle_of_an_answer(forks: Forks, bundle: Path) -> None:
    with matrix("SIGTERM", "serve") as outcome:
        with serving(forks, bundle) as server:
            whole = server.text()
            with server.client.stream("POST", "/v1/completions", json={**ASKED, "stream": True}) as answer:
                lines = answer.iter_lines()
                pieces = [next(line for line in lines if line)]
                server.terminate()
                pieces += [line for line in lines if line]
        assert server.ended is not None
        assert server.ended.code == 143, server.ended.log
        assert pieces.pop() == "data: [DONE]"
        chunks = [json.loads(piece.removeprefix("data: ")) for piece in pieces]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"]) == whole
        outcome("finishes its answers, exit 143")


@pytest.mark.parametrize("change", ["removed", "replaced"])
def test_a_bundle_that_is_taken_away(forks: Forks, bundle: Path, tmp_path: Path, change: str) -> None:
    """A server keeps what it opened."""
    with matrix(f"input {change}", "serve") as outcome:
        with serving(forks, bundle) as server:
            before = server.text()
            for path in sorted(bundle.iterdir()):
                if change == "replaced":
                    (tmp_path / "other").write_bytes(bytes(path.stat().st_size))
                    (tmp_path / "other").replace(path)
                else:
                    path.unlink()
            assert server.text() == before
        assert server.ended is not None
        assert server.ended.code == 143, server.ended.log
        outcome("same answers")


def test_killed_in_the_middle_of_an_answer(forks: Forks, bundle: Path) -> None:
    with matrix("SIGKILL", "serve") as outcome:
        with serving(forks, bundle) as server:
            whole = server.text()
            with server.client.stream("POST", "/v1/completions", json={**ASKED, "stream": True}) as answer:
                next(answer.iter_lines())
                server.kill()
        assert server.ended is not None
        assert server.ended.code == -signal.SIGKILL, server.ended.log
        with serving(forks, bundle) as server:
            assert server.text() == whole
        outcome("starts again, same answers")


def test_a_clock_that_goes_backwards(forks: Forks, bundle: Path) -> None:
    with matrix("clock", "serve") as outcome:
        with serving(forks, bundle) as server:
            before = server.text()
        with serving(forks, bundle, Fault(clock=True)) as server:
            assert server.text() == before
        assert server.ended is not None
        assert server.ended.code == 143, server.ended.log
        outcome("same answers")


def test_a_bundle_of_an_odd_name_that_is_read_only(forks: Forks, bundle: Path, disk: Path) -> None:
    with matrix("odd names", "serve") as odd, matrix("read-only inputs", "serve") as read_only:
        require(disk)
        with serving(forks, bundle) as server:
            before = server.text()
        place = Path(shutil.copytree(bundle, disk / "Größe 'naïve' 模型 \"x\" $HOME 100% #1"))
        remount(disk, "ro")
        with serving(forks, place) as server:
            assert server.text() == before
        odd("same answers")
        read_only("same answers")


def test_a_port_that_is_taken(forks: Forks, bundle: Path) -> None:
    with matrix("port taken", "serve") as outcome, socket.create_server(("127.0.0.1", 0)) as other:
        assert "in use" in refused(begun(forks, bundle, Fault(), other.getsockname()[1]))
        outcome("exit 5")


def test_a_bundle_that_cannot_be_read(forks: Forks, bundle: Path) -> None:
    with matrix("read error (EIO)", "serve") as outcome:
        assert "Input/output error" in refused(begun(forks, bundle, Fault("read_bytes", 1, error=errno.EIO)))
        outcome("exit 5")


def test_no_memory(forks: Forks, bundle: Path) -> None:
    with matrix("low memory", "serve") as outcome:
        ended = begun(forks, bundle, Fault(memory=1))
        if ended.code not in (-signal.SIGABRT, -signal.SIGSEGV):  # the C library's own end
            assert "memory" in refused(ended).lower()
        outcome(f"{ending(ended)} without memory")
