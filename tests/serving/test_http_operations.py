"""Operations: health, figures, logs, the key, full queues, clients that go or stall, and an end that loses nothing."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import httpx
import openai
import psutil
import pytest

from exporter.runtime.generate import generate
from exporter.runtime.runner import Runner
from exporter.serving.connection import Connection
from exporter.serving.engine import BatchingEngine
from exporter.serving.service import Limits
from tests.serving.running import Running, of_defects, running, wait_for

LONG: dict[str, Any] = {"max_tokens": 400, "temperature": 0, "extra_body": {"ignore_eos": True}}


def test_health_and_figures(demo: Path) -> None:
    with running([f"demo={demo}"]) as server:
        assert (server.get("/healthz").text, server.get("/readyz").text) == ("ok\n", "ready\n")
        client = server.client()
        client.completions.create(model="demo", prompt="One", n=2, max_tokens=5, extra_body={"ignore_eos": True})
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="none", prompt="One")
        paths = {"path": "/v1/completions"}
        assert server.metric("exporter_http_requests_total", status="200", **paths) == 1
        assert server.metric("exporter_http_requests_total", status="404", **paths) == 1
        assert server.metric("exporter_errors_total", code="model_not_found") == 1
        assert server.metric("exporter_generated_tokens_total", bundle="demo") == 10
        assert server.metric("exporter_time_to_first_token_seconds_count", model="demo") == 2
        assert server.metric("exporter_time_per_token_seconds_count", model="demo") == 8
        assert server.metric("exporter_choices_total", model="demo", finish_reason="length") == 2
        assert server.metric("exporter_slots", bundle="demo") == 8
        assert server.metric("exporter_slots_running", bundle="demo") == 0
        assert server.metric("process_resident_memory_bytes") > 1e6


def slow_down(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Every step takes so long at least: nothing ends by itself while a test looks."""
    original = Runner.append

    def append(self: Runner, *arguments: Any) -> Any:
        time.sleep(seconds)
        return original(self, *arguments)

    monkeypatch.setattr(Runner, "append", append)


def health(server: Running) -> list[tuple[int, str]]:
    answers = [server.get(path) for path in ("/healthz", "/readyz")]
    return [(answer.status_code, answer.text) for answer in answers]


def test_a_draining_server_is_well_and_not_ready(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down(monkeypatch, 0.01)
    with running([f"demo={demo}"], drain=60) as server:
        stream = iter(server.client().completions.create(model="demo", prompt="One", stream=True, **LONG))
        next(stream)
        assert health(server) == [(200, "ok\n"), (200, "ready\n")]
        server.stop()
        wait_for(lambda: health(server) == [(200, "ok\n"), (503, "not ready\n")])
        refused = server.post("/v1/completions", {"model": "demo", "prompt": "Two"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert list(stream)[-1].choices[0].finish_reason == "length"


def test_a_server_whose_worker_has_died_is_neither_well_nor_ready(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running([f"tiny={tiny}"]) as server:
        monkeypatch.setattr(server.service.engines["tiny"], "_let_out", lambda: 1 / 0)
        assert server.post("/v1/completions", {"model": "tiny", "prompt": "a"}).status_code == 503
        wait_for(lambda: health(server) == [(503, "a worker has ended\n"), (503, "not ready\n")])
        assert of_defects(server.lines()) == [("error", "ZeroDivisionError", "division by zero")]


def test_a_request_is_one_line_without_its_text(tiny: Path) -> None:
    for log_prompts in (False, True):
        with running([f"tiny={tiny}"], log_prompts=log_prompts) as server:
            response = server.post("/v1/completions", {"model": "tiny", "prompt": "my secret", "max_tokens": 3})
            wait_for(lambda server=server: server.lines())
            (line,) = server.lines()
            assert line["id"] == response.headers["x-request-id"]
            assert line | {"status": 200, "model": "tiny", "prompt_tokens": 9, "stream": False} == line
            assert line["new_tokens"] == response.json()["usage"]["completion_tokens"]
            assert ("my secret" in json.dumps(line)) is log_prompts


def test_a_defect_in_a_connection_is_a_line(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaking(*_: Any) -> None:
        raise ValueError("a defect")

    monkeypatch.setattr(Connection, "send_400_response", breaking)
    with running([f"tiny={tiny}"]) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as raw:
            raw.sendall(b"no HTTP\r\n\r\n")
            assert raw.recv(100) == b""
        assert of_defects(server.lines()) == [("error", "ValueError", "a defect")]
        assert server.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    ("place", "code"),
    [
        ("exporter.serving.batch.next_token", "computation_failed"),  # in the engine: its stream's last event
        ("exporter.serving.completions.completion_logprobs", "internal_error"),  # in the app: nothing more comes
    ],
)
def test_what_fails_in_the_middle_of_a_stream_is_an_error_in_the_log(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, place: str, code: str
) -> None:
    original, calls = resolve_name(place), []

    def breaking(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) > 1:
            raise ValueError("a defect")
        return original(*arguments)

    monkeypatch.setattr(place, breaking)
    body = {"model": "tiny", "prompt": "a", "max_tokens": 40, "logprobs": 1, "echo": True, "stream": True}
    with running([f"tiny={tiny}"]) as server:
        with raw_post(server, body) as raw:
            assert raw.recv(12) == b"HTTP/1.1 200"
            wait_for(lambda: any(line["event"] == "request" for line in server.lines()))
        assert of_defects(server.lines()) == [("error", "ValueError", "a defect")]
        (line,) = [line for line in server.lines() if line["event"] == "request"]
        assert (line["level"], line["error"]) == ("error", code)


def test_the_key_is_asked_for(tiny: Path) -> None:
    with running([f"tiny={tiny}"], api_key="sesame") as server:
        assert len(list(server.client("sesame").models.list())) == 1
        with pytest.raises(openai.AuthenticationError) as refused:
            server.client("Sesame").completions.create(model="tiny", prompt="a")
        assert refused.value.code == "invalid_api_key"
        for path in ("/v1/models", "/v1/models/tiny", "/metrics"):
            for headers in ({}, {"authorization": "Basic sesame"}, {"authorization": b"Bearer \xff\xe9"}):
                response = server.get(path, headers=headers)
                assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
        for path in ("/healthz", "/readyz", "/"):
            assert server.get(path).status_code == 200
        assert "sesame" not in server.log.getvalue()


def test_a_full_queue_is_429_with_retry_after(demo: Path) -> None:
    with running([f"demo={demo}"], slots=1, queue=1) as server:
        client = server.client()
        first = client.completions.create(model="demo", prompt="One", stream=True, **LONG)
        next(iter(first))  # has the slot
        second = threading.Thread(
            target=client.completions.create, kwargs={"model": "demo", "prompt": "Two", "max_tokens": 1}
        )
        second.start()
        wait_for(lambda: server.metric("exporter_queue_requests", bundle="demo") == 1)
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(model="demo", prompt="Three")
        assert int(refused.value.response.headers["retry-after"]) >= 1
        assert refused.value.code == "queue_full"
        assert server.metric("exporter_errors_total", code="queue_full") == 1
        first.close()
        second.join(20)
        assert not second.is_alive()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot(demo: Path, stream: bool) -> None:
    with running([f"demo={demo}"]) as server:
        body = {"model": "demo", "prompt": "One", "max_tokens": 500, "ignore_eos": True, "stream": stream}
        with raw_post(server, body | {"temperature": 0}) as raw:
            if stream:
                assert raw.recv(300)
            wait_for(lambda: server.metric("exporter_slots_running", bundle="demo") == 1)
        wait_for(lambda: server.metric("exporter_slots_running", bundle="demo") == 0)
        wait_for(lambda: any(line.get("path") == "/v1/completions" for line in server.lines()))
        (line,) = [line for line in server.lines() if line["path"] == "/v1/completions"]
        assert line["status"] == 499
        assert line["new_tokens"] < 500


@contextmanager
def raw_post(server: Running, body: dict[str, Any], buffer: int = 1 << 16) -> Iterator[socket.socket]:
    """The connection of a client whose kernel takes about `buffer` bytes without being read."""
    host, port = server.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.socket() as raw:
        raw.settimeout(20)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        raw.connect((host, int(port)))
        raw.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        yield raw


UNREAD = 4096  # bytes that each side's kernel holds for who reads nothing


def test_who_reads_nothing_of_a_stream_is_cut_off_and_its_slot_freed_while_others_are_served(
    demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate(demo, prompt="Two", max_new_tokens=3).text
    slow_down(monkeypatch, 0.03)
    body = {"model": "demo", "prompt": "One " * 60, "max_tokens": 300, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "echo": True, "logprobs": 5}
    with running([f"demo={demo}"], slots=2, limits=Limits(write=1.5)) as server:
        server.bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNREAD)  # the accepted ones' too
        engine = server.service.engines["demo"]
        with raw_post(server, body, UNREAD):
            wait_for(lambda: engine.stats().running == 1)
            other = server.client().completions.create(model="demo", prompt="Two", max_tokens=3, temperature=0)
            assert other.choices[0].text == expected
            assert engine.stats().running == 1  # not yet cut off
            wait_for(lambda: engine.stats().running == 0)
        lines = [line for line in server.lines() if line["event"] == "request"]
    assert [line["status"] for line in lines] == [200, 499]
    assert lines[1]["new_tokens"] < 300


def test_who_leaves_the_end_of_an_answer_unread_is_cut_off(tiny: Path) -> None:
    """The answer is written as far as its request is concerned: what holds the rest is the connection."""
    body = {"model": "tiny", "prompt": "a" * 50, "max_tokens": 4, "n": 4, "echo": True, "logprobs": 5}
    with running([f"tiny={tiny}"], limits=Limits(write=0.5)) as server:
        server.bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNREAD)
        port = server.bound.getsockname()[1]

        def connected() -> bool:
            its = [one for one in psutil.Process().net_connections("tcp") if one.laddr.port == port]
            return any(one.status == psutil.CONN_ESTABLISHED for one in its)

        with raw_post(server, body, UNREAD):
            wait_for(server.lines)
            assert [line["status"] for line in server.lines()] == [200]
            assert connected()
            wait_for(lambda: not connected(), 10)


def test_who_sends_nothing_is_cut_off(tiny: Path) -> None:
    with running([f"tiny={tiny}"], limits=Limits(read=0.3)) as server:
        host, port = server.url.removeprefix("http://").split(":")
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        for sent, expected in (
            (b"", b""),  # no request at all: closed without a word
            (head, b""),  # half a head
            (head + b"Content-Length: 50\r\n\r\n{", b"HTTP/1.1 408 "),  # half a body
        ):
            with socket.create_connection((host, int(port)), timeout=10) as raw:
                raw.sendall(sent)
                began = time.monotonic()
                try:
                    answer = raw.recv(13)
                except ConnectionResetError:
                    answer = b""
                assert answer == expected
                assert 0.2 < time.monotonic() - began < 5
        # A connection in use is not cut off between its requests.
        with httpx.Client(base_url=server.url) as client:
            for _ in range(2):
                assert client.get("/healthz").status_code == 200
                time.sleep(0.5)


def test_a_request_that_fails_half_submitted_leaves_no_stream_behind(
    demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running([f"demo={demo}"]) as server:
        engine = server.service.engines["demo"]
        submitted: list[Any] = []

        def submit(request: Any) -> Any:
            if submitted:
                raise RuntimeError("a defect")
            submitted.append(BatchingEngine.submit(engine, request))  # pyright: ignore[reportArgumentType]
            return submitted[0]

        monkeypatch.setattr(engine, "submit", submit)
        body = {"model": "demo", "prompt": "One", "n": 2, "max_tokens": 500, "ignore_eos": True}
        assert server.post("/v1/completions", body).status_code == 500
        assert submitted[0].cancelled
        wait_for(lambda: engine.stats().finished == {"cancelled": 1})


def test_no_memory_for_a_request_is_503_with_retry_after(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaking(*_: Any) -> Any:
        raise MemoryError

    with running([f"tiny={tiny}"]) as server:
        with monkeypatch.context() as patch:
            patch.setattr("exporter.serving.batch.generators", breaking)
            response = server.post("/v1/completions", {"model": "tiny", "prompt": "a"})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "out_of_memory")
        assert int(response.headers["retry-after"]) >= 1
        assert server.post("/v1/completions", {"model": "tiny", "prompt": "a"}).status_code == 200


def test_a_deadline_ends_an_answer(demo: Path) -> None:
    with running([f"demo={demo}"], slots=1, limits=Limits(request=0.4)) as server:
        longer: dict[str, Any] = LONG | {"max_tokens": 500}
        made = server.client().completions.create(model="demo", prompt="One", **longer)
        assert made.usage is not None
        assert 0 < made.usage.completion_tokens < 500
        assert made.choices[0].finish_reason == "length"
