"""`.bin` files as tensors at offsets, equal to what torch loads; nothing in them is executed."""

from pathlib import Path

import pytest
import torch

from exporter.errors import InputRefused
from exporter.sources.torch_file import read_header
from exporter.sources.values import read_rows, read_tensor


def test_values_are_those_of_torch_load(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = torch.randn(6, 4)
    state = {"a": torch.randn(5, 3).half(), "b": whole, "view": whole[2:5], "c": torch.randn(()), "i": torch.arange(9)}
    torch.save(state, tmp_path / "x.bin")
    infos = read_header(tmp_path / "x.bin")
    loaded = torch.load(tmp_path / "x.bin", weights_only=True)
    assert set(infos) == set(loaded)
    for name, tensor in loaded.items():
        assert torch.equal(read_tensor(infos[name]), tensor)
    assert torch.equal(read_rows(infos["a"], 1, 3), loaded["a"][1:3])


@pytest.mark.parametrize("content", [[torch.ones(2)], {"a": [1, 2]}, torch.ones(3)], ids=["list", "nested", "tensor"])
def test_what_is_not_a_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(InputRefused, match=r"x\.bin"):
        read_header(tmp_path / "x.bin")


def test_transposed_storage_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"turned": torch.randn(3, 4).T}, tmp_path / "x.bin")
    with pytest.raises(InputRefused, match="turned"):
        read_header(tmp_path / "x.bin")


@pytest.mark.parametrize("keep", [0, 10, 300, -30])
def test_truncated_files_are_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "x.bin"
    torch.save({"a": torch.randn(64, 64)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputRefused, match=r"x\.bin"):
        read_header(path)
