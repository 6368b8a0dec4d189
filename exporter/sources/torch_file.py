"""PyTorch `.bin` files as tensors at offsets. `legacy_torch_file` interprets their pickles: nothing is executed.

torch.load, even with weights_only, can be made to take all memory or all time by a few bytes of pickle; and it does not
say where a tensor's bytes stand.
"""

import zipfile
from pathlib import Path

from exporter.errors import InputRefused
from exporter.sources import legacy_torch_file
from exporter.sources.legacy_torch_file import PICKLES_LIMIT, Malformed, StorageRef
from exporter.sources.tensors import TensorInfo, item_size

LOCAL_HEADER = 30  # bytes before the name in a zip file's local header


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
        return _read_archive(path)
    except Malformed as error:
        raise InputRefused(
            f"{path} holds more than tensors, or is damaged: {error}",
            expected="a state dict of tensors, written by torch.save",
            todo="fetch it again; if it still fails, do not load it and get the model as safetensors",
        ) from error
    # zipfile meets hostile bytes with errors of many classes, NotImplementedError and struct.error among them
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, LookupError, RuntimeError, ArithmeticError) as error:
        raise InputRefused(
            f"{path} cannot be read: {(str(error).splitlines() or [type(error).__name__])[0][:300]}",
            expected="a .bin written by torch.save",
            todo="fetch it again",
        ) from error


def _begins_as_zip(path: Path) -> bool:
    """What torch.load itself decides by."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"PK\x03\x04"
    except OSError as error:
        raise InputRefused(f"{path} cannot be read: {error.strerror}", expected="a .bin that may be read") from error


def _read_archive(path: Path) -> dict[str, TensorInfo]:
    """`<root>/data.pkl` is the state dict; `<root>/data/<key>` are the bytes of the storages it refers to."""
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: info for info in archive.infolist()}
        if len(records) != len(archive.infolist()):
            raise Malformed("it holds a record twice")
        pickles = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise Malformed("it holds no data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        if records[pickles[0]].file_size > PICKLES_LIMIT:
            raise Malformed(f"its data.pkl is larger than {PICKLES_LIMIT} bytes")
        order = records.get(root + "byteorder")
        if order is not None and (order.file_size > 16 or archive.read(order) != b"little"):
            raise Malformed("it was not written on a little-endian machine")
        storages: dict[str, StorageRef] = {}
        state = legacy_torch_file.interpret_bytes(archive.read(pickles[0]), storages)
    if not isinstance(state, dict):
        raise Malformed(f"it holds a {type(state).__name__}, not a state dict")
    size = path.stat().st_size
    starts = {key: _start(path, size, records.get(f"{root}data/{key}"), ref) for key, ref in storages.items()}
    return {name: legacy_torch_file.tensor_info(path, name, value, starts) for name, value in state.items()}


def _start(path: Path, size: int, record: zipfile.ZipInfo | None, storage: StorageRef) -> int:
    """Where a storage's bytes begin; they must stand in its record as they are."""
    if record is None:
        raise Malformed(f"the storage {storage.key[:40]!r} is missing")
    if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
        raise Malformed(f"the storage {storage.key[:40]!r} is compressed")
    if storage.numel * item_size(storage.dtype) > record.file_size:
        raise Malformed(f"the storage {storage.key[:40]!r} has {record.file_size} bytes, fewer than its tensors")
    with path.open("rb") as file:
        file.seek(record.header_offset)
        header = file.read(LOCAL_HEADER)
    name, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    start = record.header_offset + LOCAL_HEADER + name + extra
    if not header.startswith(b"PK\x03\x04") or start + record.file_size > size:
        raise Malformed(f"the storage {storage.key[:40]!r} lies outside the file")
    return start
