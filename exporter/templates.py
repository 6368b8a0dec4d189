"""Chat templates are programs. A sandbox keeps them from the machine, a process of their own from its time and memory.

Jinja's sandbox forbids what a template may touch, not how long it runs: three nested loops over `range(99999)` take
years, and `'x' * 10**10` takes all memory. Only the templates that come with this package are rendered in the caller's
process; every other one is rendered by a worker that is killed when it takes more than SECONDS or MEMORY.
"""

import atexit
import json
import os
import resource
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 5.0
START_SECONDS = 60.0  # a loaded machine may take long to start an interpreter
MEMORY = 512 << 20  # address space beyond what the worker has after its imports
TEXT = 16 << 20  # letters of a rendered chat; a prompt of 100,000 tokens has about half a million


class RenderError(Exception):
    """Says why a template gave no text."""


class _Generation(Extension):
    """`{% generation %}` marks an answer for training masks; a prompt renders what is inside it."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own class attribute)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    """As transformers builds it (utils/chat_template_utils.py), in a sandbox: a template is untrusted."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    helpers: dict[str, Callable[[str], object]] = {
        "raise_exception": _raise_exception,
        "strftime_now": lambda pattern: datetime.now().strftime(pattern),
    }
    environment.globals.update(helpers)
    return environment


@lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


def render_here(template: str, variables: Mapping[str, Any], today: str | None = None) -> str:
    """The text of a trusted template, in this process. RenderError if it is malformed or refuses its variables.

    today: the ISO date or time that `strftime_now` gives, in place of the clock's.
    """
    now = {} if today is None else {"strftime_now": datetime.fromisoformat(today).strftime}
    try:
        text = _compiled(template).render(**variables, **now)
    except MemoryError as error:
        raise RenderError(f"it takes more than {MEMORY >> 20} MB") from error
    except Exception as error:  # a template may raise whatever the methods that it calls raise
        raise RenderError(str(error)[:500] or type(error).__name__) from error
    if len(text) > TEXT:
        raise RenderError(f"it gives {len(text)} letters, more than {TEXT}")
    return text


def render_apart(template: str, variables: Mapping[str, Any], today: str | None = None) -> str:
    """The text of an untrusted template, from the worker. RenderError as above, and beyond SECONDS or MEMORY."""
    try:
        line = json.dumps({"template": template, "variables": dict(variables), "today": today})
    except (TypeError, ValueError, RecursionError) as error:
        raise RenderError(f"the messages are not JSON: {error}") from error
    reply = _WORKER.ask(line.encode())
    if "error" in reply:
        raise RenderError(reply["error"])
    return reply["text"]


class _Worker:
    """The process that renders, started at first use and again after it was killed. One template at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, line: bytes) -> dict[str, str]:
        with self._lock:
            process = self._started()
            assert process.stdin is not None
            try:
                process.stdin.write(line + b"\n")
                process.stdin.flush()
                return json.loads(self._answer(process, SECONDS))
            except TimeoutError as error:
                raise RenderError(f"it takes more than {SECONDS:g} seconds") from error
            except (OSError, ValueError) as error:
                raise RenderError(f"it ended the process that renders it, which may take {MEMORY >> 20} MB") from error
            finally:
                if process.poll() is not None:
                    self._process = None

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._process is None or self._process.poll() is not None or self._owner != os.getpid():
            # -P: the working directory, which may be a model's, is no place to import from.
            command = [sys.executable, "-P", "-m", "exporter.templates"]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self._owner = os.getpid()
            self._answer(self._process, START_SECONDS)
        return self._process

    def _answer(self, process: "subprocess.Popen[bytes]", seconds: float) -> bytes:
        """One line; a worker that is late is killed."""
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], seconds)[0]:
            process.kill()
            process.wait()
            raise TimeoutError
        line = process.stdout.readline()
        if not line.endswith(b"\n"):
            process.kill()
            process.wait()
            raise OSError("no answer")
        return line

    def close(self) -> None:
        if self._process is not None and self._owner == os.getpid():
            with suppress(OSError):
                self._process.kill()


_WORKER = _Worker()
atexit.register(_WORKER.close)


def _serve() -> None:
    """The worker: a template and its variables on each line of stdin, the text or an error on each line of stdout."""
    with suppress(RenderError):
        render_here("{{ [1] | tojson }}{{ x.y }}", {})  # imports what rendering and its errors need
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    out = sys.stdout.buffer
    out.write(b"{}\n")
    out.flush()
    for line in sys.stdin.buffer:
        try:
            request = json.loads(line)
            reply = {"text": render_here(request["template"], request["variables"], request["today"])}
        except RenderError as error:
            reply = {"error": str(error)}
        out.write(json.dumps(reply).encode() + b"\n")
        out.flush()


if __name__ == "__main__":
    _serve()
