"""What bench_serve.py compares: how each server is started over one checkpoint's weights, and asked."""

import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decode_models import PEERS, Missing, Place, make_bundle, make_gguf, run

# What the peers' environment holds: bench_decode's, and what llama-cpp-python's server needs.
SERVER_PEERS = (*PEERS, PEERS[0].replace("==", "[server]=="))
Words = list[str | Path]


@dataclass(frozen=True)
class Start:
    """One process of a server: for so many streams, each with room for `context` tokens."""

    place: Place
    model: Path
    port: int
    streams: int
    context: int


@dataclass(frozen=True)
class Server:
    """make: the model of `flavour`; raises Missing. ready: the path that answers 200 once requests are taken.

    extra: fields of the body beside OpenAI's: where a server can ignore stop tokens, it does.
    """

    make: Callable[[Place, str], Path]
    flavour: str
    command: Callable[[Start], Words]
    ready: str
    extra: Mapping[str, Any] = field(default_factory=dict)


def exporter(start: Start) -> Words:
    words: Words = [sys.executable, "-m", "exporter.cli", "serve", start.model, "--quiet"]
    return [*words, "--port", str(start.port), "--threads", str(start.place.threads)]


def llama_cpp_python(start: Start) -> Words:
    """It computes one request at a time. Its defaults, but for what would hold it back: an answer that ends when the
    next request comes, the logits of every position of a prompt, half of the cores.
    """
    words: Words = [start.place.peers_python, "-m", "llama_cpp.server", "--model", start.model]
    options = {
        "port": start.port,
        "n_ctx": start.context,
        "n_threads": start.place.threads,
        "n_threads_batch": start.place.threads,
        "interrupt_requests": False,
        "logits_all": False,
        "verbose": False,
    }
    return [*words, *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def llama_server(start: Start) -> Words:
    """A slot for each stream; the context is shared out among them."""
    words: Words = ["llama-server", "-m", start.model, "--port", str(start.port), "--threads", str(start.place.threads)]
    return [*words, "-np", str(start.streams), "-c", str(start.streams * start.context)]


def make_for_llama_cpp_python(place: Place, kind: str) -> Path:
    run([place.peers_python, "-c", "import llama_cpp.server.app"])
    return make_gguf(place, kind)


def make_for_llama_server(place: Place, kind: str) -> Path:
    if shutil.which("llama-server") is None:
        raise Missing("llama-server is not on the PATH")
    return make_gguf(place, kind)


OURS, IGNORE = "/readyz", {"ignore_eos": True}
SERVERS = {
    "exporter-int8": Server(make_bundle, "int8/32", exporter, OURS, IGNORE),
    "exporter-int4": Server(make_bundle, "int4/32", exporter, OURS, IGNORE),
    "exporter-int8-block128": Server(make_bundle, "int8/128", exporter, OURS, IGNORE),
    "exporter-int4-block128": Server(make_bundle, "int4/128", exporter, OURS, IGNORE),
    "llama_cpp.server-q8_0": Server(make_for_llama_cpp_python, "q8_0", llama_cpp_python, "/v1/models"),
    "llama_cpp.server-q4_0": Server(make_for_llama_cpp_python, "q4_0", llama_cpp_python, "/v1/models"),
    "llama-server-q8_0": Server(make_for_llama_server, "q8_0", llama_server, "/health", IGNORE),
    "llama-server-q4_0": Server(make_for_llama_server, "q4_0", llama_server, "/health", IGNORE),
}
