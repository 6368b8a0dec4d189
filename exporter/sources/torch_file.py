"""PyTorch `.bin` files as tensors at offsets. Pickles are read by torch's restricted unpickler: nothing is executed."""

import pickle
import zipfile
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from exporter.errors import InputRefused
from exporter.sources import legacy_torch_file
from exporter.sources.tensors import NAMES, TensorInfo


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensors by name, without reading a value: a zip `.bin` stores each tensor's bytes uncompressed.

    So does the format before PyTorch 1.6, which is no zip file. Raises InputRefused for a pickle that asks for code
    and for a file that is not a state dict.
    """
    if not _begins_as_zip(path):
        return legacy_torch_file.read_header(path)
    if not zipfile.is_zipfile(path):
        raise InputRefused(
            f"{path} begins as a zip file and has no end, so it is truncated",
            expected="a .bin written by torch.save",
            todo="fetch it again",
        )
    try:
        with FakeTensorMode():
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputRefused(
            f"{path} holds more than tensors: {_first_sentence(error)}",
            expected="a state dict of tensors",
            todo="do not load this file; get the model as safetensors",
        ) from error
    except (RuntimeError, OSError, ValueError, EOFError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise InputRefused(
            f"{path} cannot be read: {_first_sentence(error)}",
            expected="a .bin written by torch.save",
            todo="fetch it again",
        ) from error
    if not isinstance(state, dict):
        raise InputRefused(f"{path} holds a {type(state).__name__}", expected="a state dict of tensors")
    size = path.stat().st_size
    return {str(name): _tensor(path, str(name), value, size) for name, value in state.items()}


def _begins_as_zip(path: Path) -> bool:
    """What torch.load itself decides by."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"PK\x03\x04"
    except OSError as error:
        raise InputRefused(f"{path} cannot be read: {error.strerror}", expected="a .bin that may be read") from error


def _tensor(path: Path, name: str, value: object, size: int) -> TensorInfo:
    if not isinstance(value, torch.Tensor):
        raise InputRefused(f"{path}: {name!r} is a {type(value).__name__}", expected="a tensor under every name")
    if value.dtype not in NAMES:
        raise InputRefused(f"{path}: {name!r} has type {value.dtype}", expected="one of " + ", ".join(NAMES.values()))
    if not value.is_contiguous():
        raise InputRefused(
            f"{path}: {name!r} is stored with strides {value.stride()}",
            expected="row-major tensors",
            todo="save the model again with tensor.contiguous()",
        )
    start = value.untyped_storage()._checkpoint_offset
    offset = int((start or 0) + value.storage_offset() * value.element_size())
    nbytes = value.numel() * value.element_size()
    if start is None or start < 0 or value.storage_offset() < 0 or offset + nbytes > size:
        raise InputRefused(
            f"{path}: {name!r} lies outside the file", expected=f"at most {size} bytes", todo="fetch it again"
        )
    return TensorInfo(name, NAMES[value.dtype], tuple(value.shape), path, offset, nbytes)


def _first_sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    wanted = [line for line in lines if "GLOBAL" in line or "global" in line]
    return (wanted or lines or [type(error).__name__])[0][:300]
