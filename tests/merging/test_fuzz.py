"""Inputs mutated at random: refused with one of Exporter's errors, or merged as PEFT merges them. Never anything else.

Nothing may take memory or time that the files' own size does not explain, so every example has a limit on both.
"""

import copy
import io
import json
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import exporter
from exporter.errors import ExporterError, InputRefused
from exporter.sources import safetensors_file, torch_file
from exporter.sources.checkpoint import open_checkpoint
from exporter.sources.values import read_tensor
from tests.limits import TooLate, limits
from tests.pairs import Pair, as_bin, gpt2_config, make_pair, peft_merge, save_base

# Address space that an example may add: far above what a tiny merge needs, far below what a bomb asks for.
MEMORY = 4 << 30
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"

fuzzing = settings(
    max_examples=200,
    derandomize=True,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=(HealthCheck.too_slow, HealthCheck.function_scoped_fixture),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    pair = make_pair(tmp_path_factory.mktemp("fuzz"), gpt2_config(n_layer=1, n_embd=8, n_head=2))
    merged = exporter.merge(base=pair.base, adapter=pair.adapter, out=pair.base.parent / "wanted", proof="none")
    assert merged.plan.changed
    return pair


@pytest.fixture(scope="module")
def wanted(made: Pair) -> dict[str, torch.Tensor]:
    return load_file(made.base.parent / "wanted/model.safetensors")


def outcome(pair: Pair, out: Path) -> dict[str, torch.Tensor] | ExporterError:
    """What a merge makes of `pair`, or its refusal. Every other exception is a failure, and so is what is left."""
    refusal: ExporterError | None = None
    try:
        with limits(memory=MEMORY):
            exporter.merge(base=pair.base, adapter=pair.adapter, out=out, proof="none")
    except ExporterError as error:
        refusal = error
    if refusal is not None:
        assert not out.exists(), "a refusal left something behind"
        assert str(refusal).strip()
        assert refusal.exit_code in (2, 4, 5)
        return refusal
    try:
        return load_file(out / "model.safetensors")
    finally:
        shutil.rmtree(out)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return set(first) <= set(second) and all(torch.equal(first[name], second[name]) for name in first)


WILD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**6), 10**6),
    st.sampled_from([-1, 0, 2**31, 2**63, 10**12, 10**30, -(10**30), 10**400, 1e308, -0.0, 1e-320]),
    st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    st.text(max_size=8),
    st.sampled_from(["\ud800", "\0", "../x", "a" * 5000, "(a+)+$", "(a|a)*b", "(", "ü模", "__class__", "1e9"]),
    st.lists(st.one_of(st.integers(-5, 10**12), st.text(max_size=4), st.none()), max_size=4),
    st.dictionaries(st.text(max_size=6), st.one_of(st.integers(-5, 10**12), st.text(max_size=4)), max_size=3),
    st.integers(50, 3000).map(lambda depth: json.loads("[" * min(depth, 900) + "]" * min(depth, 900))),
)


@st.composite
def json_mutations(draw: st.DrawFn) -> list[tuple[int, str, Any]]:
    """Up to three changes: which key (by number), what is done, and the new value."""
    kinds = st.sampled_from(["set", "set", "set", "drop", "add", "deep", "rename"])
    return draw(st.lists(st.tuples(st.integers(0, 10**6), kinds, WILD), min_size=1, max_size=3))


def mutated(document: dict[str, Any], mutations: list[tuple[int, str, Any]]) -> dict[str, Any]:
    document = copy.deepcopy(document)
    for number, kind, value in mutations:
        place: Any = document
        if kind == "deep":  # a value inside a value
            inside = [part for part in document.values() if isinstance(part, dict) and part]
            place = inside[number % len(inside)] if inside else document
        keys = list(place)
        key = keys[number % len(keys)] if keys else "x"
        if kind in ("set", "deep"):
            place[key] = value
        elif kind == "drop":
            place.pop(key, None)
        elif kind == "add":
            place[str(value)[:40]] = value
        else:
            place[key + "_"] = place.pop(key, None)
    return document


@contextmanager
def changed_file(path: Path, data: bytes) -> Iterator[None]:
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(before)


def dump(document: Any) -> bytes:
    return json.dumps(document).encode()


@fuzzing
@given(mutations=json_mutations())
def test_the_adapters_configuration(made: Pair, wanted: dict[str, torch.Tensor], mutations: Any) -> None:
    """Where it is accepted with a scale and ranks as before, the weights are as before."""
    path = made.adapter / ADAPTER_CONFIG
    before = json.loads(path.read_text())
    after = mutated(before, mutations)
    with changed_file(path, dump(after)):
        result = outcome(made, made.base.parent / "out")
    keys = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "peft_type")
    if isinstance(result, dict) and all((before.get(k) or 0) == (after.get(k) or 0) for k in keys):
        assert same(wanted, result)


@fuzzing
@given(mutations=json_mutations())
def test_the_bases_configuration(made: Pair, wanted: dict[str, torch.Tensor], mutations: Any) -> None:
    """Whatever it says, a merge that is made has the values of the tensors that the files have."""
    path = made.base / "config.json"
    with changed_file(path, dump(mutated(json.loads(path.read_text()), mutations))):
        result = outcome(made, made.base.parent / "out")
    if isinstance(result, dict):
        assert same(result, {**wanted, "lm_head.weight": wanted["transformer.wte.weight"]})


HUGE = (10**6, 10**9, 10**12, 10**18, 10**30, -1)


@pytest.mark.parametrize("value", HUGE)
@pytest.mark.parametrize(
    "key", ["n_layer", "n_embd", "n_head", "n_positions", "n_inner", "vocab_size", "num_labels", "pad_token_id"]
)
def test_absurd_sizes_are_refused_at_once(made: Pair, key: str, value: int) -> None:
    """A million layers take minutes to build, even without weights; a billion labels take all memory."""
    path = made.base / "config.json"
    with changed_file(path, dump({**json.loads(path.read_text()), key: value})):
        result = outcome(made, made.base.parent / "out")
    harmless = key == "pad_token_id" or (key, value) in (("n_head", -1), ("num_labels", -1))  # for the weights
    assert isinstance(result, ExporterError) or harmless


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_hidden_layers": 10**6}, "layers"),
        ({"num_labels": 10**9}, "labels"),
        ({"num_local_experts": 10**7}, "experts"),
        ({"num_local_experts": 900, "num_hidden_layers": 900}, "experts"),
        ({"text_config": {"num_hidden_layers": 10**6}}, "layers"),
    ],
)
def test_counts_that_no_weights_show(made: Pair, changes: dict[str, Any], match: str) -> None:
    path = made.base / "config.json"
    document = dump({**json.loads(path.read_text()), **changes})
    with changed_file(path, document), limits(memory=MEMORY), pytest.raises(InputRefused, match=match):
        open_checkpoint(made.base)


def test_counts_of_real_models_pass(made: Pair) -> None:
    path = made.base / "config.json"
    real = {
        "shared_expert_intermediate_size": 20480, "num_experts": 60, "num_experts_per_tok": 4, "num_hidden_layers": 24,
        "block_size": 4096, "attention_window_layers": 70, "expert_capacity": 64, "layer_norm_epsilon": 1e-5,
    }  # fmt: skip
    with changed_file(path, dump({**json.loads(path.read_text()), **real})):
        assert open_checkpoint(made.base).config["num_experts"] == 60


BOMBS = {
    "nested": "(a+)+$",
    "nested any": "(.*)*x",
    "nested class": "([a-z.0-9_]+)+!",
    "nested thrice": "((c_?a?t*)*n*)*$",
    "nested counts": "(?:(?:a{1,9}){1,9}){9}",
    "choice": "(a|a)*$",
    "longer choice": "(a|ab)*$",
    "options": "a?" * 30 + "a" * 30,
    "many": ".*" * 12 + "x",
    "in a look ahead": "(?=(t.*)+$)x",
    "with a reference": "(?P<n>t*)*(?P=n)!",
    "long": "x" * 10**5,
    "deep": "(" * 2000 + ")" * 2000,
    "count": "a{99999999999}",
    "broken": "(",
}


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"])
@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
def test_patterns_that_explode(made: Pair, field: str, bomb: str) -> None:
    value = {bomb: 4} if field.endswith("pattern") else bomb
    path = made.adapter / ADAPTER_CONFIG
    with changed_file(path, dump({**json.loads(path.read_text()), field: value})):
        result = outcome(made, made.base.parent / "out")
    assert isinstance(result, InputRefused)
    assert field in str(result)


@pytest.mark.parametrize(
    "pattern",
    [
        "c_attn", r"h\.\d+\.attn\.c_attn", r"^(?:model\.)?h\.(0|1|2)\.attn", "(c_attn|c_proj)", ".*attn.*c_attn",
        r"(?!.*mlp)transformer\.h\.[0-9]{1,2}\..*", "",
    ],
)  # fmt: skip
def test_patterns_that_people_write_still_match(made: Pair, wanted: dict[str, torch.Tensor], pattern: str) -> None:
    path = made.adapter / ADAPTER_CONFIG
    changes = {"rank_pattern": {pattern: 4}, "target_modules": pattern}
    with changed_file(path, dump({**json.loads(path.read_text()), **changes})):
        result = outcome(made, made.base.parent / "out")
    assert isinstance(result, dict)
    assert same(wanted, result)


@st.composite
def edits(draw: st.DrawFn) -> list[tuple[str, int, bytes]]:
    """Up to four edits of bytes at places given in millionths of the file, near the front more often."""
    place = st.one_of(st.integers(0, 10**6), st.integers(0, 60_000))
    what = st.sampled_from(["flip", "put", "cut", "insert", "end"])
    return draw(st.lists(st.tuples(what, place, st.binary(min_size=1, max_size=9)), min_size=1, max_size=4))


def edited(data: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    for what, place, new in changes:
        at = len(data) * place // 10**6
        if what == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ (new[0] or 1)]) + data[at + 1 :]
        elif what == "put":
            data = data[:at] + new + data[at + len(new) :]
        elif what == "cut":
            data = data[:at] + data[at + len(new) :]
        elif what == "insert":
            data = data[:at] + new + data[at:]
        elif what == "end":
            data = data[:at]
    return data


def as_peft(pair: Pair, result: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Equal to the merge of the file as it was, or to what PEFT makes of the mutated one."""
    if not same(wanted, result):
        oracle = peft_merge(pair)
        assert all(torch.equal(result[name], oracle[name]) for name in result)


@fuzzing
@given(changes=edits())
def test_the_adapters_bytes(made: Pair, wanted: dict[str, torch.Tensor], changes: Any) -> None:
    path = made.adapter / ADAPTER
    with changed_file(path, edited(path.read_bytes(), changes)):
        result = outcome(made, made.base.parent / "out")
        if isinstance(result, dict):
            as_peft(made, result, wanted)


@pytest.fixture(scope="module")
def old(made: Pair, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The same adapter as adapter_model.bin."""
    directory = tmp_path_factory.mktemp("bin") / "adapter"
    shutil.copytree(made.adapter, directory)
    torch.save(load_file(directory / ADAPTER), directory / "adapter_model.bin")
    (directory / ADAPTER).unlink()
    return Pair(made.base, directory)


@fuzzing
@given(changes=edits())
def test_the_bytes_of_an_adapter_that_is_a_pickle(old: Pair, wanted: dict[str, torch.Tensor], changes: Any) -> None:
    path = old.adapter / "adapter_model.bin"
    with changed_file(path, edited(path.read_bytes(), changes)):
        result = outcome(old, old.adapter.parent / "out")
        if isinstance(result, dict):
            as_peft(old, result, wanted)


@fuzzing
@given(changes=edits())
def test_the_pickle_inside_a_bin(old: Pair, wanted: dict[str, torch.Tensor], changes: Any) -> None:
    """Most edits of the file fall on values; these all fall on what is interpreted."""
    path = old.adapter / "adapter_model.bin"
    data = repacked(path.read_bytes(), lambda pickle: edited(pickle, changes))
    with changed_file(path, data):
        result = outcome(old, old.adapter.parent / "out")
        if isinstance(result, dict):
            as_peft(old, result, wanted)


def repacked(data: bytes, change: Callable[[bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """The archive with another data.pkl."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old_, zipfile.ZipFile(target, "w", compression) as new:
        for name in old_.namelist():
            content = old_.read(name)
            new.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return target.getvalue()


def nested_tuples(_: bytes) -> bytes:
    """t = (t, t) fifty times, then {t: None}: hashing the key takes 2^50 steps."""
    return b"\x80\x02}N\x85" + b"q\x01h\x01\x86" * 50 + b"Ns."


def large_bytearray(_: bytes) -> bytes:
    """bytearray(10**11), which torch's restricted unpickler calls."""
    return b"\x80\x02cbuiltins\nbytearray\n\x8a\x05" + (10**11).to_bytes(5, "little") + b"\x85R."


@pytest.mark.parametrize("bomb", [nested_tuples, large_bytearray, lambda data: bytes(100 << 20)])
def test_bombs_in_a_pickle(old: Pair, bomb: Callable[[bytes], bytes]) -> None:
    path = old.adapter / "adapter_model.bin"
    with changed_file(path, repacked(path.read_bytes(), bomb, zipfile.ZIP_DEFLATED)):
        assert isinstance(outcome(old, old.adapter.parent / "out"), InputRefused)


def test_a_compressed_bin_is_refused(old: Pair) -> None:
    """Its offsets would point at compressed bytes."""
    path = old.adapter / "adapter_model.bin"
    with changed_file(path, repacked(path.read_bytes(), lambda data: data, zipfile.ZIP_DEFLATED)):
        result = outcome(old, old.adapter.parent / "out")
    assert isinstance(result, InputRefused)
    assert "compressed" in str(result)


def test_a_storage_shorter_than_its_tensors_is_refused(old: Pair, tmp_path: Path) -> None:
    """The bytes after it are another tensor's, and would be read as this one's."""
    torch.save({"a": torch.ones(64), "b": torch.zeros(64)}, tmp_path / "x.bin")
    count = b"K\x40"  # 64, in the persistent id and in the shape
    data = repacked((tmp_path / "x.bin").read_bytes(), lambda pickle: pickle.replace(count, b"K\x60"))
    (tmp_path / "x.bin").write_bytes(data)
    with pytest.raises(InputRefused, match="fewer than its tensors"):
        torch_file.read_header(tmp_path / "x.bin")


@fuzzing
@given(mutations=json_mutations(), number=st.integers(0, 100))
def test_the_header_of_a_safetensors_file(
    made: Pair, wanted: dict[str, torch.Tensor], mutations: Any, number: int
) -> None:
    """A header of the base, mutated as JSON and put back with a true length."""
    path = made.base / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    names = list(header)
    entry = names[number % len(names)]
    if number % 3:
        header[entry] = mutated(header[entry], mutations)
    else:
        header = mutated(header, mutations)
    raw = dump(header)
    with changed_file(path, len(raw).to_bytes(8, "little") + raw + data[8 + length :]):
        result = outcome(made, made.base.parent / "out")
    if isinstance(result, dict):
        assert same(wanted, result)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F16", "shape": [10**12, 4], "data_offsets": [0, 8 * 10**12]},
        {"dtype": "F16", "shape": [2**62] * 100_000, "data_offsets": [0, 0]},
        {"dtype": "F16", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]},
        {"dtype": "F16", "shape": [0] + [2] * 100, "data_offsets": [0, 0]},
        {"dtype": "F16", "shape": [-1, -4], "data_offsets": [0, 8]},
        {"dtype": "F16", "shape": [True, 4], "data_offsets": [0, 8]},
        {"dtype": "F16", "shape": [2.0, 2], "data_offsets": [0, 8]},
        {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]},
    ],
)  # fmt: skip
def test_shapes_that_cannot_be(tmp_path: Path, entry: dict[str, Any]) -> None:
    raw = dump({"x": entry})
    (tmp_path / "x.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))
    with limits(memory=MEMORY), pytest.raises(InputRefused, match="malformed"):
        safetensors_file.read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "text", ['{"\\ud800": 1}', "[" * 10**5, '{"a":' * 200 + "1" + "}" * 200, "9" * 10**6, '"\xff"']
)
@pytest.mark.parametrize("name", ["config.json", ADAPTER_CONFIG, ADAPTER])
def test_json_that_no_one_can_use(made: Pair, text: str, name: str) -> None:
    path = (made.base if name == "config.json" else made.adapter) / name
    raw = text.encode("latin-1")
    with changed_file(path, raw if name.endswith("json") else len(raw).to_bytes(8, "little") + raw):
        assert isinstance(outcome(made, made.base.parent / "out"), InputRefused)


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("index") / "base"
    save_base(directory, gpt2_config(n_layer=1, n_embd=8, n_head=2))
    as_bin(directory, shards=2)
    return directory


@fuzzing
@given(mutations=json_mutations())
@example(mutations=[(0, "set", {"x": "../../etc/passwd"})])
@example(mutations=[(0, "set", {"x": "/dev/zero"})])
def test_the_index(indexed: Path, mutations: Any) -> None:
    """Shards outside of the directory are never opened, and what is read is what the files hold."""
    path = indexed / "pytorch_model.bin.index.json"
    wanted = set(open_checkpoint(indexed).tensors)
    with changed_file(path, dump(mutated(json.loads(path.read_text()), mutations))), limits(memory=MEMORY):
        try:
            found = open_checkpoint(indexed)
        except InputRefused:
            return
    assert set(found.tensors) == wanted
    assert {file.parent for file in found.files} == {indexed}


def _compute_for_ever() -> None:
    while True:
        pass


def test_the_limits_of_these_tests_are_limits() -> None:
    """Without this, a hang or a bomb would pass as soon as the guard broke."""
    with pytest.raises(TooLate), limits(seconds=0.02, memory=MEMORY):
        _compute_for_ever()
    with pytest.raises(TooLate), limits(seconds=0.02, memory=MEMORY):
        time.sleep(30)
    with pytest.raises(MemoryError), limits(memory=MEMORY):
        bytearray(MEMORY + (1 << 30))


def test_an_absurd_rank(made: Pair) -> None:
    for rank in (10**9, 2**31, 10**400, -4, 0, 4.0, "4", True):
        path = made.adapter / ADAPTER_CONFIG
        with changed_file(path, dump({**json.loads(path.read_text()), "r": rank})):
            assert isinstance(outcome(made, made.base.parent / "out"), InputRefused), rank


def test_what_is_read_is_what_torch_reads(old: Pair) -> None:
    """The mutations above start from a file that is read rightly."""
    infos = torch_file.read_header(old.adapter / "adapter_model.bin")
    loaded = torch.load(old.adapter / "adapter_model.bin", weights_only=True)
    assert set(infos) == set(loaded)
    assert all(torch.equal(read_tensor(infos[name]), loaded[name]) for name in loaded)
