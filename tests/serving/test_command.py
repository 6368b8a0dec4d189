"""`exporter serve` as a process: its end, its key, its log, and what it says of what cannot be served."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from openai import OpenAI

from exporter.errors import EnvironmentLacking, InputRefused, UsageError
from exporter.runtime.generate import generate
from exporter.runtime.load import load
from exporter.serving.serve import serve
from tests.serving.conftest import TINY_POSITIONS
from tests.serving.running import of_defects, wait_for

LONG: dict[str, Any] = {"max_tokens": 400, "temperature": 0, "extra_body": {"ignore_eos": True}}
EXPORTER = [sys.executable, "-m", "exporter.cli", "serve"]


@contextmanager
def command(
    *arguments: object, program: Sequence[str] = EXPORTER, **environment: str
) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """`exporter serve ... --json` in a process of its own, and its ready document."""
    words = [*program, *map(str, arguments), "--port", "0", "--json", "--threads", "1"]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment
    )
    assert process.stdout is not None
    text = ""
    while True:
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        text += line
        if line == "}\n":
            break
    try:
        yield process, json.loads(text)
    finally:
        process.kill()
        process.communicate()


def test_sigterm_in_the_middle_of_a_stream_loses_nothing(demo: Path) -> None:
    expected = generate(demo, prompt="Once upon a time", max_new_tokens=300).text
    with command(f"demo={demo}") as (process, ready):
        assert ready["models"][0] | {"id": "demo", "precision": "int8"} == ready["models"][0]
        client = OpenAI(base_url=ready["url"] + "/v1", api_key="none", max_retries=0)
        settings = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 300, "temperature": 0}
        whole: list[str] = []
        other = threading.Thread(target=lambda: whole.append(client.completions.create(**settings).choices[0].text))
        stream = iter(client.completions.create(**settings, stream=True))
        pieces = [next(stream).choices[0].text]
        other.start()
        wait_for(
            lambda: 'exporter_engine_requests_total{bundle="demo"} 2.0' in httpx.get(ready["url"] + "/metrics").text
        )
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        with pytest.raises((openai.InternalServerError, openai.APIConnectionError)) as refused:
            client.completions.create(**settings)
        if isinstance(refused.value, openai.InternalServerError):  # the stream was still under way
            assert refused.value.status_code == 503
            assert refused.value.response.headers["retry-after"]
        pieces += [chunk.choices[0].text for chunk in stream]
        other.join(30)
        assert "".join(pieces) == expected
        assert whole == [expected]
        out, log = process.communicate(timeout=30)
        assert (process.returncode, out) == (143, "")
        lines = [json.loads(line) for line in log.splitlines()]
        assert lines[-1] | {"event": "stopped", "drained": True} == lines[-1]


def test_only_this_machine_reaches_a_server_that_was_not_told_otherwise(tiny: Path) -> None:
    with command(tiny) as (process, ready):
        sockets = psutil.Process(process.pid).net_connections("tcp")
        assert {one.laddr.ip for one in sockets if one.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
        assert ready["url"].startswith("http://127.0.0.1:")


def test_a_drain_timeout_ends_streams_with_an_error(demo: Path) -> None:
    with command(f"demo={demo}", "--drain-timeout", "0") as (process, ready):
        client = OpenAI(base_url=ready["url"] + "/v1", api_key="none", max_retries=0)
        stream = iter(client.completions.create(model="demo", prompt="One", stream=True, **LONG))
        next(stream)
        process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        log = process.communicate(timeout=30)[1]
        assert process.returncode == 130
    (line,) = [line for line in map(json.loads, log.splitlines()) if line["event"] == "request"]
    assert (line["level"], line["status"], line["error"]) == ("warning", 200, "shutting_down")


DEFECTIVE = """
import exporter.serving.app, exporter.serving.batch
from exporter.cli import main
def breaking(*arguments):
    raise ValueError("a defect")
exporter.serving.batch.next_token = exporter.serving.app.render_messages = breaking
main()
"""


def test_a_defect_is_one_line_without_verbose_too(tiny: Path) -> None:
    with command(f"tiny={tiny}", program=[sys.executable, "-c", DEFECTIVE, "serve"]) as (process, ready):
        for path, body in (("completions", {"prompt": "a"}), ("chat/render", {"messages": []})):
            assert httpx.post(f"{ready['url']}/v1/{path}", json={"model": "tiny"} | body).status_code == 500
        process.send_signal(signal.SIGTERM)
        log = process.communicate(timeout=30)[1]
    assert of_defects(list(map(json.loads, log.splitlines()))) == [("error", "ValueError", "a defect")] * 2


def test_the_key_comes_from_a_file_or_the_environment(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("from-file\n")
    with command(tiny, "--api-key-file", tmp_path / "key", EXPORTER_API_KEY="from-environment") as (_, ready):
        assert ready["api_key"] is True
        for key, status in (("from-file", 200), ("from-environment", 401)):
            headers = {"authorization": f"Bearer {key}"}
            assert httpx.get(ready["url"] + "/v1/models", headers=headers).status_code == status


def fails(*arguments: object, code: int) -> str:
    words = [*EXPORTER, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


def test_what_cannot_be_served_is_said(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} on 127.0.0.1 is in use" in fails(tiny, "--port", port, code=5)
    with pytest.raises(EnvironmentLacking, match="no address of this machine"):
        serve(tiny, host="192.0.2.1", port=0)
    with pytest.raises(UsageError, match="two models are named"):
        serve([tiny, tiny], port=0)
    with pytest.raises(InputRefused, match="no exported graph"):
        serve(tmp_path, port=0)
    with pytest.raises(UsageError, match="cannot be read"):
        serve(tiny, port=0, api_key_file=tmp_path / "none")
    with pytest.raises(UsageError, match="no bundle"):
        serve([], port=0)
    monkeypatch.setenv("EXPORTER_API_KEY", " ")
    with pytest.raises(UsageError, match="API_KEY holds no usable API key"):
        serve(tiny, port=0)


def test_the_cache_memory_bounds_the_slots(tiny: Path) -> None:
    one = load(tiny).cache_bytes(1, TINY_POSITIONS)
    with command(f"tiny={tiny}", "--cache-memory", f"{(4 * one - 1) / 1000}kB") as (_, ready):
        figures = httpx.get(ready["url"] + "/metrics").text
    assert 'exporter_slots{bundle="tiny"} 3.0' in figures
    assert f'exporter_cache_bytes{{bundle="tiny"}} {float(3 * one)}' in figures
    message = fails(tiny, "--port", 0, "--cache-memory", one - 1, code=2)
    assert f"a slot of {TINY_POSITIONS} positions takes" in message
    assert f"at least {one} bytes" in message
    assert "is not a size" in fails(tiny, "--port", 0, "--cache-memory", "0GB", code=2)
    with pytest.raises(UsageError, match="a slot of"):
        serve(tiny, port=0, cache_memory=0)


def test_an_open_address_is_warned_of(tiny: Path) -> None:
    with command(tiny, "--host", "0.0.0.0") as (process, _):
        process.send_signal(signal.SIGTERM)
        lines = [json.loads(line) for line in process.communicate(timeout=30)[1].splitlines()]
    (warning,) = [line for line in lines if line["level"] == "warning"]
    assert "EXPORTER_API_KEY" in warning["message"]
