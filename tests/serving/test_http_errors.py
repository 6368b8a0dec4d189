"""Bad input: OpenAI's error body with the right status, whatever comes, and the server lives on."""

import json
import socket
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import OpenAI

from exporter.serving.service import Limits
from tests.serving.conftest import TINY_POSITIONS
from tests.serving.running import Running, running

COMPLETION = {"model": "tiny", "prompt": "Hello", "max_tokens": 2}
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
JSON = {"content-type": "application/json"}


def refused(response: httpx.Response, status: int, param: str | None = None, code: str | None = None) -> str:
    """The message of an error in OpenAI's form."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    kind = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
    assert error["type"] == kind
    if param is not None:
        assert error["param"] == param
    if code is not None:
        assert error["code"] == code
    assert "/tmp" not in error["message"]
    return error["message"]


WRONG: list[tuple[str, Any]] = [
    ("model", 7),
    ("prompt", 7),
    ("prompt", ""),
    ("prompt", []),
    ("prompt", [""]),
    ("prompt", [[]]),
    ("prompt", ["a", 1]),
    ("prompt", [1.5]),
    ("prompt", [True]),
    ("prompt", [-1]),
    ("prompt", [257]),
    ("prompt", [10**30]),
    ("prompt", {"text": "a"}),
    ("max_tokens", -1),
    ("max_tokens", 0),
    ("max_tokens", "2"),
    ("max_tokens", 1.5),
    ("max_tokens", True),
    ("n", 0),
    ("n", 129),
    ("n", 65),
    ("best_of", 1),
    ("suffix", "x"),
    ("logit_bias", {"1": 2}),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", "hot"),
    ("top_p", 0),
    ("top_p", 1.1),
    ("top_k", -1),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", ["a"] * 5),
    ("stop", 3),
    ("seed", 1.5),
    ("seed", 1 << 63),
    ("logprobs", 6),
    ("logprobs", True),
    ("echo", 1),
    ("stream", "true"),
    ("stream_options", {"include_usage": True}),  # without stream
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0),
    ("ignore_eos", "no"),
    ("user", 5),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda value: json.dumps(value)[:30])
def test_a_wrong_value_is_named(server: Running, name: str, value: Any) -> None:
    assert refused(server.post("/v1/completions", COMPLETION | {name: value}), 400, param=name)


WRONG_CHAT: list[tuple[str, Any]] = [
    ("messages", []),
    ("messages", "Hello"),
    ("messages", [{"role": "user"}]),
    ("messages", [{"role": "poet", "content": "a"}]),
    ("messages", [{"role": "user", "content": None}]),
    ("messages", [{"role": "user", "content": []}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
    ("messages", [{"role": "user", "content": "a", "mood": "b"}]),
    ("top_logprobs", 2),  # without logprobs
    ("logprobs", 2),
    ("max_completion_tokens", 0),
    ("tools", []),
    ("response_format", {"type": "json_object"}),
]


@pytest.mark.parametrize(("name", "value"), WRONG_CHAT, ids=lambda value: json.dumps(value)[:40])
def test_a_wrong_value_in_a_chat_is_named(server: Running, name: str, value: Any) -> None:
    assert name in refused(server.post("/v1/chat/completions", CHAT | {name: value}), 400, param=name)


def test_missing_and_unknown_fields(server: Running) -> None:
    assert "prompt" in refused(server.post("/v1/completions", {"model": "tiny"}), 400, "prompt")
    assert "messages" in refused(server.post("/v1/chat/completions", {"model": "demo"}), 400, "messages")
    body = COMPLETION | {"temprature": 1}
    assert "temprature" in refused(server.post("/v1/completions", body), 400, "temprature", "unknown_parameter")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_an_unknown_model(server: Running, client: OpenAI, path: str) -> None:
    body = (COMPLETION if path == "/v1/completions" else CHAT) | {"model": "gpt-9"}
    assert "demo" in refused(server.post(path, body), 404, "model", "model_not_found")
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        client.models.retrieve("gpt-9")


def test_the_context_is_never_exceeded(server: Running) -> None:
    """A prompt of n_positions tokens still has one more token to say, which needs no position of its own."""
    code = "context_length_exceeded"
    full = [1] * TINY_POSITIONS
    assert server.post("/v1/completions", COMPLETION | {"prompt": full, "max_tokens": 1}).status_code == 200
    message = refused(server.post("/v1/completions", COMPLETION | {"prompt": full}), 400, "max_tokens", code)
    assert "at most 1 may follow" in message
    message = refused(server.post("/v1/completions", COMPLETION | {"prompt": [*full, 1]}), 400, "prompt", code)
    assert f"{TINY_POSITIONS + 1} tokens" in message
    refused(server.post("/v1/completions", COMPLETION | {"max_tokens": 10**18}), 400, "max_tokens", code)
    refused(server.post("/v1/chat/completions", CHAT | {"max_tokens": 100_000}), 400, "max_tokens", code)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"model": "tiny", "prompt": "\xff"}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "a", "temperature": 1e999}',
        b'{"model": "tiny", "prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    ],
    ids=range(12),
)
def test_a_body_that_is_no_json_object(server: Running, content: bytes) -> None:
    refused(server.post("/v1/completions", content=content, headers=JSON), 400)


@pytest.mark.parametrize("kind", ["text/plain", "", "application/jsonp", "multipart/form-data; boundary=x"])
def test_another_content_type_is_refused(server: Running, kind: str) -> None:
    """A page elsewhere can send text/plain to a loopback port without asking; JSON it cannot."""
    response = server.post("/v1/completions", content=json.dumps(COMPLETION), headers={"content-type": kind})
    refused(response, 415)
    charset = {"content-type": "application/json; charset=utf-8"}
    assert server.post("/v1/completions", content=json.dumps(COMPLETION), headers=charset).status_code == 200


def test_wrong_paths_and_methods(server: Running) -> None:
    refused(server.get("/v2/completions"), 404, code="unknown_url")
    refused(server.get("/v1/completions/"), 404)
    refused(server.post("/healthz", {}), 405, code="method_not_allowed")
    response = httpx.delete(server.url + "/v1/completions")
    refused(response, 405)
    assert response.headers["allow"] == "POST"


def test_too_large_a_body_is_413_however_it_is_sent(tiny) -> None:
    with running([f"tiny={tiny}"], limits=Limits(body=1000)) as server:
        body = json.dumps(COMPLETION | {"user": "u" * 900}).encode()
        assert len(body) <= 1000
        assert server.post("/v1/completions", content=body, headers=JSON).status_code == 200
        for content in (b" " * 1001, b" " * 3_000_000, iter([b" " * 600, b" " * 600])):
            refused(server.post("/v1/completions", content=content, headers=JSON), 413, code="request_too_large")
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as raw:  # announced, never sent
            raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
            raw.sendall(b"Content-Length: 99999999999\r\n\r\n")
            assert raw.recv(100).startswith(b"HTTP/1.1 413 ")


def test_what_is_no_http_is_400(server: Running) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    for junk in (b"\x16\x03\x01 hello\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 500_000):
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(junk)
            assert raw.recv(100).startswith(b"HTTP/1.1 400 ")
    assert server.get("/healthz").status_code == 200


CHUNKED = b"Host: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("line", [b"GET /healthz HTTP/1.1\r\n", b"POST /v1/none HTTP/1.1\r\n"])
def test_a_body_that_breaks_off_in_the_packet_of_its_head_is_400(server: Running, line: bytes) -> None:
    """The request is answered by then: its answer is not written into the connection that has ended."""
    host, port = server.url.removeprefix("http://").split(":")
    seen = len(server.lines())
    with socket.create_connection((host, int(port)), timeout=20) as raw:
        raw.sendall(line + CHUNKED + b"no length\r\n")
        assert b"".join(iter(lambda: raw.recv(1000), b"")).startswith(b"HTTP/1.1 400 ")
    assert server.get("/healthz").status_code == 200
    assert [line.get("traceback") for line in server.lines()[seen:] if line["level"] == "error"] == []


def test_a_body_that_breaks_off_after_its_answer_closes_the_connection(tiny: Path) -> None:
    with running([f"tiny={tiny}"], limits=Limits(body=10)) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as raw:
            raw.sendall(b"POST /v1/none HTTP/1.1\r\n" + CHUNKED)
            assert raw.recv(1000).startswith(b"HTTP/1.1 404 ")
            raw.sendall(b"no length\r\n")
            while raw.recv(1000):
                pass
        assert server.get("/healthz").status_code == 200
        assert [line for line in server.lines() if line["level"] == "error"] == []


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
FIELDS = st.sampled_from([name for name, _ in [*WRONG, *WRONG_CHAT]])


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    chat=st.booleans(),
    changes=st.dictionaries(FIELDS, ANYTHING, min_size=1, max_size=3),
    dropped=st.sets(FIELDS, max_size=1),
)
def test_no_body_gives_a_5xx(server: Running, chat: bool, changes: dict[str, Any], dropped: set[str]) -> None:
    base: dict[str, Any] = CHAT if chat else COMPLETION
    body = {key: value for key, value in (base | changes).items() if key not in dropped}
    content = json.dumps(body)  # NaN and Infinity too
    path = "/v1/chat/completions" if chat else "/v1/completions"
    response = server.post(path, content=content, headers=JSON)
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        refused(response, response.status_code)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60))
def test_no_bytes_give_a_5xx(server: Running, content: bytes) -> None:
    refused(server.post("/v1/completions", content=content, headers=JSON), 400)


def test_nothing_of_all_this_was_an_error_of_the_server(server: Running) -> None:
    wrong = [line for line in server.lines() if line["level"] == "error"]
    assert not wrong, wrong[0].get("traceback", wrong[0])
    assert server.post("/v1/completions", COMPLETION).status_code == 200
    assert server.get("/readyz").text == "ready\n"
