"""A fuzz target for every parser: a value, or one of Exporter's errors, within the limits. `make fuzz` runs them long.

tests/merging/test_fuzz.py mutates the same kinds of file and compares what a whole merge makes of them with PEFT.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exporter.errors import ExporterError
from exporter.graph.bundle import bundles_in
from exporter.graph.genai_config import stop_tokens
from exporter.graph.graph_check import load_graph, require_our_operators
from exporter.graph.weights import open_weights
from exporter.json_text import parse_json
from exporter.manifest import read_manifest
from exporter.manifest_check import verify_manifest
from exporter.merging.card import licence_of
from exporter.parity.documents import read_rows
from exporter.parity.reference import read_capture
from exporter.prompts import chat_template, render_chat, special_tokens
from exporter.runtime.text import load_tokenizer
from exporter.sources import legacy_torch_file, safetensors_file, torch_file
from exporter.sources.adapter import open_adapter
from exporter.sources.checkpoint import open_checkpoint
from exporter.spec import read_spec
from tests.hostile.material import Tree
from tests.hostile.pickles import PROGRAMS, PROTO, old_format
from tests.limits import limits
from tests.merging.test_fuzz import edited, edits, json_mutations, mutated

EXAMPLES = int(os.environ.get("EXPORTER_FUZZ_EXAMPLES", "25"))
fuzzing = settings(
    max_examples=EXAMPLES,
    derandomize="EXPORTER_FUZZ_EXAMPLES" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=(HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def files(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """The good files, in place: every example changes one and puts it back."""
    root = tmp_path_factory.mktemp("fuzz") / "files"
    shutil.copytree(material, root)
    return Tree(root, root)


def refused_or_read(path: Path, data: bytes, read: Callable[[], object]) -> None:
    """Every exception but Exporter's own is a failure of the test that calls this."""
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        with limits(), suppress(ExporterError):
            read()
    finally:
        path.write_bytes(before)


def read_adapter_file(path: Path) -> object:
    try:
        file = ort.AdapterFormat.read_adapter(str(path))  # pyright: ignore[reportArgumentType] (takes str only)
        return file.get_parameters()
    except Exception as error:
        raise ExporterError("refused") from error


BYTES: dict[str, tuple[str, Callable[[Tree], object]]] = {
    "safetensors": (
        "base/model.safetensors", lambda t: safetensors_file.read_header(t.base / "model.safetensors"),
    ),
    "names of codes": ("int8/weights.safetensors", lambda t: open_weights(t.int8 / "weights.safetensors")),
    "captured reference": ("reference", lambda t: read_capture(t.root / "reference")),
    "spec": ("spec.toml", lambda t: read_spec(t.root / "spec.toml")),
    "card": ("merged/README.md", lambda t: licence_of(t.merged)),
    "prompts": ("prompts.jsonl", lambda t: read_rows(t.root / "prompts.jsonl")),
    "tokenizer": ("merged/tokenizer.json", lambda t: load_tokenizer(t.merged).encode("Hi there")),
    "manifest": ("merged/exporter.json", lambda t: (read_manifest(t.merged), bundles_in(t.merged))),
    "graph": (
        "merged/model.onnx",
        lambda t: require_our_operators(t.merged / "model.onnx", load_graph(t.merged / "model.onnx")),
    ),
    "adapter at run time": (
        "separate/adapter.onnx_adapter", lambda t: read_adapter_file(t.separate / "adapter.onnx_adapter"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BYTES)
@fuzzing
@given(changes=edits())
def test_edited_bytes(files: Tree, name: str, changes: Any) -> None:
    place, read = BYTES[name]
    path = files.root / place
    refused_or_read(path, edited(path.read_bytes(), changes), lambda: read(files))


DOCUMENTS: dict[str, tuple[str, Callable[[Tree], object]]] = {
    "config": ("base/config.json", lambda t: open_checkpoint(t.base)),
    "adapter config": ("adapter/adapter_config.json", lambda t: open_adapter(t.adapter)),
    "manifest": ("merged/exporter.json", lambda t: verify_manifest(t.merged)),
    "tokenizer": ("merged/tokenizer.json", lambda t: load_tokenizer(t.merged).encode("Hi there")),
    "generation config": ("merged/generation_config.json", lambda t: stop_tokens(t.merged, {"model_type": "gpt2"})),
    "template": ("base/tokenizer_config.json", lambda t: (chat_template(t.base), special_tokens(t.base))),
}


@pytest.mark.parametrize("name", DOCUMENTS)
@fuzzing
@given(mutations=json_mutations())
def test_mutated_documents(files: Tree, name: str, mutations: Any) -> None:
    place, read = DOCUMENTS[name]
    path = files.root / place
    document = mutated(json.loads(path.read_bytes()), mutations)
    refused_or_read(path, json.dumps(document).encode(), lambda: read(files))


@pytest.mark.parametrize("name", DOCUMENTS)
@fuzzing
@given(document=JSON)
def test_any_document(files: Tree, name: str, document: Any) -> None:
    place, read = DOCUMENTS[name]
    refused_or_read(files.root / place, json.dumps(document).encode(), lambda: read(files))


@fuzzing
@given(weight_map=JSON)
def test_the_index(files: Tree, weight_map: Any) -> None:
    index = files.base / "model.safetensors.index.json"
    index.write_text("{}")
    try:
        refused_or_read(index, json.dumps({"weight_map": weight_map}).encode(), lambda: open_checkpoint(files.base))
    finally:
        index.unlink()


@fuzzing
@given(data=st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_json_text(data: bytes) -> None:
    with limits(), suppress(ValueError):
        value = parse_json(data)
        json.dumps(value).encode()


YAML = st.sampled_from(
    ["license", "license_name", "mit", ": ", ":", "\n", "\n  ", "- ", "? ", "[", "]", "{", "}", ", ", "&a ", "*a", "|",
     ">-", "<<: ", "!!int ", "!!python/name:os.system ", '"', "'", "\\u", "\\U", "ffffffff", "#", "---", "...",
     "%YAML ", "7", "1:", ".5", "null", "\t", "\0", "\ufeff"]
)  # fmt: skip


@fuzzing
@given(parts=st.lists(YAML | st.text(max_size=4), max_size=40))
def test_a_card(files: Tree, parts: list[str]) -> None:
    card = "---\nlicense: " + "".join(parts) + "\n---\n"
    refused_or_read(files.merged / "README.md", card.encode(), lambda: licence_of(files.merged).encode())


JINJA = st.sampled_from(
    ["{{ ", " }}", "{% ", " %}", "{# ", " #}", "for m in messages", "endfor", "if ", "else", "endif", "set x = ",
     "macro x()", "endmacro", "x()", "messages", "messages[0]", "m", ".content", "['content']", "|tojson", "|list",
     "|map('upper')", "|attr(", "'__class__'", "range(", "10**9", ")", "'x' * ", " ~ ", "raise_exception(", "'%'",
     "strftime_now(", "generation", "endgeneration", "break", "namespace(",
     "{% for m in messages %}{{ m['content'] }}{% endfor %}"]
)  # fmt: skip


@fuzzing
@given(parts=st.lists(JINJA | st.text(max_size=4), max_size=20))
def test_a_template(parts: list[str]) -> None:
    with limits(), suppress(ExporterError):
        render_chat("".join(parts), [{"role": "user", "content": "Hi"}])


CODES = b"\x80(.0123FIJKLMNSTUVXabcdeghijlopqrstu}]\x85\x86\x87\x93R"
OPCODES = st.sampled_from([bytes([code]) for code in CODES])
ORDERED_DICT = b"ccollections\nOrderedDict\n"
PARTS = st.one_of(
    OPCODES,
    st.binary(max_size=6),
    st.sampled_from(list(PROGRAMS.values())).filter(lambda part: len(part) < 1000),
    st.sampled_from([b"ctorch\nFloatStorage\n", ORDERED_DICT, b"ctorch._utils\n_rebuild_tensor_v2\n"]),
    JSON.map(lambda value: pickle.dumps(value, 2)[2:-1]),
)  # fmt: skip


@settings(fuzzing, max_examples=8 * EXAMPLES)
@given(parts=st.lists(PARTS, max_size=12))
def test_the_interpreter_of_pickles(parts: list[bytes]) -> None:
    with limits(), suppress(legacy_torch_file.Malformed):
        legacy_torch_file.interpret_bytes(PROTO + b"".join(parts) + b".", {})


@fuzzing
@given(parts=st.lists(PARTS, max_size=6), rest=st.binary(max_size=32))
def test_an_old_bin(tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], rest: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.bin"
    path.write_bytes(old_format(b"".join(parts)) + rest)
    with limits(), suppress(ExporterError):
        torch_file.read_header(path)
