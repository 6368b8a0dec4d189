"""The header reader agrees with the safetensors library, on good files and on malformed ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from exporter.errors import InputRefused
from exporter.sources.safetensors_file import read_header
from exporter.sources.values import read_rows, read_tensor

TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool]


def written(path: Path, header: Any, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("dtype", TYPES)
def test_values_are_those_of_the_library(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = {
        "a": (torch.randn(7, 5) * 9).to(dtype),
        "b": (torch.randn(3) * 9).to(dtype),
        "c": torch.tensor(3).to(dtype),
    }
    tensors["empty"] = torch.zeros(0, 4).to(dtype)
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    infos, metadata = read_header(tmp_path / "x.safetensors")
    assert metadata == {"format": "pt"}
    assert set(infos) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(read_tensor(infos[name]), tensor)
    assert torch.equal(read_rows(infos["a"], 2, 5), tensors["a"][2:5])


MALFORMED = {
    "hole": {"a": entry(offsets=(8, 16))},
    "overlap": {"a": entry(), "b": entry(offsets=(4, 12))},
    "beyond the end": {"a": entry(shape=(2000,), offsets=(0, 8000))},
    "negative": {"a": entry(offsets=(-8, 0))},
    "wrong size": {"a": entry(shape=(3,))},
    "unknown type": {"a": entry(dtype="F7")},
    "type is a list": {"a": entry(dtype=["F32"])},
    "huge shape": {"a": entry(shape=(1 << 40, 1 << 40))},
    "float shape": {"a": entry(shape=(2.0,))},
    "bool shape": {"a": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}},
    "one offset": {"a": entry(offsets=(0,))},
    "no dtype": {"a": {"shape": [2], "data_offsets": [0, 8]}},
    "entry is a number": {"a": 5},
    "metadata of numbers": {"__metadata__": {"a": 1}, "a": entry()},
    "trailing bytes": {"a": entry(shape=(1,), offsets=(0, 4))},
    "a list": [1],
    "not json": b"{oops",
    "not utf-8": b'{"\xff": 1}',
    "leading space": b' {"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "twice": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    b'"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
    "deep": b'{"a":' + b"[" * 100_000,
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_the_format_forbids_is_refused(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / "x.safetensors", MALFORMED[name], b"\0" * 8)
    with pytest.raises(InputRefused, match=r"x\.safetensors"):
        read_header(path)


@pytest.mark.parametrize("length", [0, 1, 100, 1 << 31, (1 << 64) - 1])
def test_header_lengths_that_do_not_fit(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(InputRefused):
        read_header(path)


counts = st.integers(-2, 12)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "U8", "I64", "XX"]),
        "shape": st.lists(counts, max_size=3),
        "data_offsets": st.lists(counts, min_size=1, max_size=3),
    }
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.dictionaries(st.sampled_from(["a", "b", "c"]), entries, max_size=3), size=st.integers(0, 24))
def test_whatever_the_library_refuses_is_refused(tmp_path: Path, header: dict[str, Any], size: int) -> None:
    path = written(tmp_path / "x.safetensors", header, b"\0" * size)
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
    except SafetensorError:
        with pytest.raises(InputRefused):
            read_header(path)
    else:
        assert set(read_header(path)[0]) == names
