"""The stages of a full-size run: what each runs, reads and writes, and the memory it may take."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.manifest import describe_file, read_manifest

HERE = Path(__file__).parent
EXPORTER = (sys.executable, "-m", "exporter.cli")
GB = 1_000_000_000
READY_SECONDS = 900.0
INSTRUCTION = "How do I make apple juice?"
BUNDLES = {"merged": "export native", "int8": "export int8", "int4": "export int4"}  # and the stage that makes each
Entries = dict[str, dict[str, Any]]
Command = tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """command: its words, paths relative to the work directory, where it runs.

    reads: the stages whose outputs it takes. outputs: what it has written, by path, as `describe_file` gives it.
    budget: of peak resident memory, in bytes. verdicts: exit codes that are a finding and no failure.
    show: a line of its output for the report. serves: it runs until it is asked once and stopped.
    """

    name: str
    command: Command
    reads: tuple[str, ...]
    outputs: Callable[[Path], Entries]
    budget: int | None = None
    verdicts: tuple[int, ...] = ()
    show: Callable[[str], str] | None = None
    serves: bool = False
    removes: tuple[str, ...] = ()  # what a run that was interrupted may have left
    keeps: str = ""  # where it may have left what it goes on from


def stages(size: tuple[str, ...], shard_size: str, new_tokens: int, verified: Iterable[str] = BUNDLES) -> list[Stage]:
    """All of them in order. size: make_base's arguments for the shape. verified: the bundles that `verify` takes."""
    pair = ("--base", "pair/base", "--adapter", "pair/adapter")
    bundles = tuple(word for name in verified for word in ("--bundle", name))
    ask = ("--instruction", INSTRUCTION, "--max-new-tokens", str(new_tokens), "--json", "--quiet")
    kind = ("--from-demo", "--format", "bin", "--dtype", "float16", "--old-buffers", "--shard-size", shard_size)
    return [
        Stage(
            "make base",
            (sys.executable, str(HERE / "make_base.py"), *size, *kind, "--out", "pair"),
            (),
            lambda work: _files(work, "pair"),
            removes=("pair",),
        ),
        Stage("inspect", (*EXPORTER, "inspect", *pair, "--json"), ("make base",), _none, show=_problems),
        Stage(
            "merge",
            (*EXPORTER, "merge", *pair, "--out", "merged", "--template", "alpaca", "--quiet"),
            ("make base",),
            lambda work: _listed(work, "merged", "merge"),
            budget=1 * GB,
            removes=("merged",),
        ),
        Stage(
            "export native",
            (*EXPORTER, "export", "merged", "--quiet"),
            ("merge",),
            lambda work: _listed(work, "merged", "export-native-cpu"),
            budget=GB // 2,
        ),
        *(
            Stage(
                f"export {precision}",
                (*EXPORTER, "export", "merged", "--precision", precision, "--out", ".", "--quiet"),
                ("merge",),
                lambda work, precision=precision: _listed(work, precision, f"export-{precision}-cpu"),
                budget=2 * GB,
                removes=(precision,),
            )
            for precision in ("int8", "int4")
        ),
        Stage(
            "verify",
            (*EXPORTER, "verify", *pair, *bundles, "--report", "parity", "--scratch", "logits", "--json", "--quiet"),
            ("make base", "merge", *(BUNDLES[name] for name in verified)),
            lambda work: _files(work, "parity"),
            budget=22 * GB,
            verdicts=(1, 3),
            show=_verdict,
            removes=("parity",),
            keeps="logits",
        ),
        *(
            Stage(
                f"generate {precision}",
                (*EXPORTER, "generate", precision, *ask),
                (f"export {precision}",),
                _none,
                budget=7 * GB if precision == "int4" else None,
                show=_text,
            )
            for precision in ("int8", "int4")
        ),
        Stage(
            "serve int4",
            (*EXPORTER, "serve", "int4", "--port", "{port}", "--quiet"),
            ("export int4",),
            _none,
            budget=7 * GB,
            serves=True,
        ),
    ]


def _none(work: Path) -> Entries:
    return {}


def _files(work: Path, directory: str) -> Entries:
    """Every file beneath a directory, hashed."""
    found = sorted(path for path in (work / directory).rglob("*") if path.is_file())
    return {str(path.relative_to(work)): describe_file(path) for path in found}


def _listed(work: Path, directory: str, section: str) -> Entries:
    """What a section of a manifest lists, with the digests that its stage took while it wrote."""
    manifest = read_manifest(work / directory) or {"stages": {}}
    return {f"{directory}/{name}": entry for name, entry in manifest["stages"][section]["files"].items()}


def _problems(out: str) -> str:
    return f"{len(json.loads(out)['problems'])} problems"


def _verdict(out: str) -> str:
    found: Mapping[str, Any] = json.loads(out)
    return f"{found['verdict']}: " + "; ".join(found["summary"].splitlines())


def _text(out: str) -> str:
    return " ".join(json.loads(out)["text"].split())


def without(command: str) -> str:
    """Why the stage of this command is left out; empty where the command exists."""
    done = subprocess.run([*EXPORTER, command, "--help"], capture_output=True, text=True)
    return "" if done.returncode == 0 else f"this version has no `exporter {command}`"


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def ask_and_stop(process: subprocess.Popen[bytes], port: int) -> str:
    """Wait until a server is ready, ask it once, and stop it as a scheduler does. Returns the completion's text."""
    address = f"http://127.0.0.1:{port}"
    until = time.monotonic() + READY_SECONDS
    while not _ready(f"{address}/readyz"):
        if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
            return ""  # its exit code and its message say why
        if time.monotonic() > until:
            raise RuntimeError(f"the server was not ready after {READY_SECONDS:.0f} s")
        time.sleep(0.2)
    try:
        model = _json(f"{address}/v1/models")["data"][0]["id"]
        body = {"model": model, "prompt": "Once upon a time", "max_tokens": 16, "temperature": 0}
        return " ".join(_json(f"{address}/v1/completions", body)["choices"][0]["text"].split())
    finally:
        process.send_signal(signal.SIGTERM)


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def _json(url: str, body: Mapping[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=READY_SECONDS) as answer:
        return json.loads(answer.read())
