"""Files of PyTorch before 1.6 as tensors at offsets, equal to what torch loads; nothing in them is executed."""

import os
import pickle
import struct
from collections import OrderedDict
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._utils import _rebuild_tensor_v2

from exporter.errors import InputRefused
from exporter.sources import legacy_torch_file
from exporter.sources.torch_file import read_header
from exporter.sources.values import read_tensor

MAGIC = legacy_torch_file.MAGIC
MACHINE = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


def save(state: object, path: Path, **options: Any) -> Path:
    torch.save(state, path, _use_new_zipfile_serialization=False, **options)
    return path


def assert_reads_as_torch_does(path: Path) -> None:
    infos = read_header(path)
    loaded = torch.load(path, weights_only=False)  # written by this test; weights_only knows protocol 2 alone
    assert list(infos) == list(loaded)
    for name, tensor in loaded.items():
        read = read_tensor(infos[name])
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read, tensor), name


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_every_type_and_shape(tmp_path: Path, protocol: int) -> None:
    torch.manual_seed(0)
    state = {f"{dtype}": (torch.randn(5, 3) * 9).to(dtype) for dtype in DTYPES}
    state |= {"scalar": torch.randn(()), "empty": torch.empty(0, 4), "one": torch.randn(1, 7, 1)}
    assert_reads_as_torch_does(save(state, tmp_path / "x.bin", pickle_protocol=protocol))


def test_shared_storages_and_views_with_offsets(tmp_path: Path) -> None:
    whole = torch.randn(6, 4)
    state = {"whole": whole, "same": whole, "rows": whole[2:5], "flat": whole.view(-1)[3:9], "other": torch.randn(3)}
    path = save(state, tmp_path / "x.bin")
    assert_reads_as_torch_does(path)
    infos = read_header(path)
    assert infos["whole"].offset == infos["same"].offset == infos["rows"].offset - 2 * 4 * 4


def test_a_module_s_state_dict_with_its_metadata_and_parameters(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    assert_reads_as_torch_does(save(model.state_dict(), tmp_path / "state.bin"))
    assert_reads_as_torch_does(save(OrderedDict(model.named_parameters()), tmp_path / "parameters.bin"))


def test_as_many_tensors_as_a_large_model_has(tmp_path: Path) -> None:
    state = {f"transformer.h.{i}.attn.c_attn.weight": torch.full((2,), float(i)) for i in range(3000)}
    assert_reads_as_torch_does(save(state, tmp_path / "x.bin"))


@pytest.mark.parametrize(
    "content", [[torch.ones(2)], {"a": [1, 2]}, torch.ones(3), {"a": {"b": torch.ones(2)}}, {1: torch.ones(2)}, 3]
)
def test_what_is_not_a_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    with pytest.raises(InputRefused, match=r"x\.bin"):
        read_header(save(content, tmp_path / "x.bin"))


def test_transposed_and_strided_views_are_refused_by_name(tmp_path: Path) -> None:
    for turned in (torch.randn(3, 4).T, torch.randn(3, 4)[:, :2], torch.randn(1).expand(5)):
        with pytest.raises(InputRefused, match=r"'turned'.*strides"):
            read_header(save({"turned": turned}, tmp_path / "x.bin"))


def test_no_truncated_file_is_read(tmp_path: Path) -> None:
    path = save({"a": torch.randn(4, 4), "b": torch.randn(3).half()}, tmp_path / "x.bin")
    content = path.read_bytes()
    for keep in range(len(content)):
        path.write_bytes(content[:keep])
        with pytest.raises(InputRefused, match=r"x\.bin"):
            read_header(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(InputRefused, match="follow its last storage"):
        read_header(path)


def test_no_changed_byte_of_the_header_escapes(tmp_path: Path) -> None:
    """Each one is refused, or is a name, shape or dtype that still lies inside the file."""
    path = save({"a": torch.randn(4, 4), "b": torch.randn(3).half()}, tmp_path / "x.bin")
    content = path.read_bytes()
    for at in range(len(content)):
        for value in (0, 0x2E, 0x52, 0xFF, content[at] ^ 1):
            path.write_bytes(content[:at] + bytes([value]) + content[at + 1 :])
            try:
                infos = read_header(path)
            except InputRefused:
                continue
            assert all(info.offset + info.nbytes <= len(content) for info in infos.values())


@pytest.mark.parametrize("content", [b"", b"\x80", b"hello", b"\x80\x02garbage", b"PK\x03\x04", b"\0" * 4096])
def test_garbage_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(InputRefused, match=r"x\.bin"):
        read_header(tmp_path / "x.bin")


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def pickles(*values: object) -> bytes:
    return b"".join(value if isinstance(value, bytes) else pickle.dumps(value, 2) for value in values)


@pytest.mark.parametrize("place", range(5))
def test_a_payload_in_any_of_the_pickles_is_not_executed(tmp_path: Path, place: int) -> None:
    values: list[object] = [MAGIC, 1001, MACHINE, {}, []]
    values[place] = {"a": Payload(tmp_path / "ran")} if place == 3 else Payload(tmp_path / "ran")
    (tmp_path / "x.bin").write_bytes(pickles(*values))
    with pytest.raises(InputRefused, match="system"):
        read_header(tmp_path / "x.bin")
    assert not (tmp_path / "ran").exists()


ORDERED_DICT = b"ccollections\nOrderedDict\n"
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04NtQ"
DEEP = b")" + b"q\x00h\x00\x86" * 60  # a tuple of a tuple of ...: its hash would take 2^60 steps


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (ORDERED_DICT + b"}X\x04\x00\x00\x00eviltb", "mark that is not there"),
        (ORDERED_DICT + b"}b", "sets attributes"),
        (b"ctorch\nFloatStorage\n)R", "calls torch.FloatStorage"),
        (b"cbuiltins\neval\nX\x01\x00\x00\x001\x85R", "builtins.eval"),
        (b"ctorch\nload\n)R", "torch.load"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x00K\x05\x85K\x01\x85\x89)tR", "not a state dict"),
        (b"}" + DEEP + b"Ns", "not a string"),
        (b"(ios\nsystem\n", "INST"),
        (b"\x82\x01", "EXT1"),
        (b"N)\x81", "NEWOBJ"),
        (b"X\xff\xff\xff\x7f", "malformed"),
        (b"\x8d" + b"\xff" * 7 + b"\x0f", "malformed"),
        (b"]Nr\xff\xff\xff\x7fa", "not a state dict"),  # a memo that an array would need 16 GB for
        (b"Nh\x09", "malformed"),
        (b"0", "POP"),
        (b"", "malformed"),
    ],
)
def test_a_pickle_that_does_more_than_a_state_dict_needs(tmp_path: Path, program: bytes, reason: str) -> None:
    (tmp_path / "x.bin").write_bytes(pickles(MAGIC, 1001, MACHINE, b"\x80\x02" + program + b".", []))
    with pytest.raises(InputRefused, match=reason):
        read_header(tmp_path / "x.bin")


def one_tensor(
    numel: int = 4, *, stored: int = 4, offset: int = 0, shape: tuple[int, ...] = (4,), stride: tuple[int, ...] = (1,),
    kind: str = "FloatStorage", keys: tuple[str, ...] = ("0",), view: object = None, machine: object = MACHINE,
) -> bytes:  # fmt: skip
    """A file of one tensor whose facts may contradict one another."""

    class Storage:
        pass

    class Rebuilt:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return _rebuild_tensor_v2, (Storage(), offset, shape, stride, False, OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: object) -> object:
            return ("storage", getattr(torch, kind), "0", "cpu", numel, view) if isinstance(obj, Storage) else None

    state = BytesIO()
    Pickler(state, 2).dump({"w": Rebuilt()})
    header = pickles(MAGIC, 1001, machine, state.getvalue(), list(keys))
    return header + struct.pack("<q", stored) + struct.pack("<4f", 1, 2, 3, 4)


def test_a_file_made_by_hand_reads_as_torch_reads_it(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(one_tensor())
    assert_reads_as_torch_does(tmp_path / "x.bin")


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"numel": 1 << 40, "stored": 1 << 40}, "truncated"),
        ({"numel": 5}, "truncated"),
        ({"stored": 3}, "another count"),
        ({"stored": -4}, "another count"),
        ({"numel": 3, "stored": 3, "shape": (3,)}, "follow its last"),
        ({"offset": 1}, "outside its storage"),
        ({"shape": (5,)}, "outside its storage"),
        ({"offset": -1}, "size that cannot be"),
        ({"shape": (-4,)}, "size that cannot be"),
        ({"shape": (2.0,)}, "size that cannot be"),
        ({"shape": (1 << 62, 1 << 62), "stride": (1 << 62, 1)}, "outside its storage"),
        ({"shape": (2,) * 65, "stride": (1,) * 65}, "too many dimensions"),
        ({"shape": (2, 2)}, "too many dimensions"),
        ({"stride": (0,)}, "strides"),
        ({"keys": ()}, "list of storages"),
        ({"keys": ("0", "0")}, "list of storages"),
        ({"keys": ("0", "1")}, "list of storages"),
        ({"view": ("1", 0, 4)}, "views"),
        ({"kind": "ComplexFloatStorage"}, "ComplexFloatStorage"),
        ({"machine": MACHINE | {"little_endian": False}}, "little-endian"),
    ],
)
def test_facts_that_contradict_the_file(tmp_path: Path, facts: dict[str, Any], reason: str) -> None:
    (tmp_path / "x.bin").write_bytes(one_tensor(**facts))
    with pytest.raises(InputRefused, match=reason):
        read_header(tmp_path / "x.bin")
