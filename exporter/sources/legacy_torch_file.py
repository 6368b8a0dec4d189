"""PyTorch's format before 1.6 as tensors at offsets. Its pickles are interpreted here: nothing in them is executed.

Such a file is five pickles (a magic number, the protocol, facts about the writing machine, the state dict, the keys of
the storages), then for each key a little-endian count of elements in 8 bytes and the raw elements.

The interpreter knows the few opcodes and names that torch.save writes. A name becomes a `Token`, which is not
callable, so a hostile pickle finds nothing on the stack that it could call or change.
"""

import math
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from exporter.errors import InputRefused
from exporter.sources.tensors import TensorInfo, item_size

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
PICKLES_LIMIT = 16 << 20  # a tensor takes some 150 bytes and 40 opcodes: this is room for 50,000
OPCODES_LIMIT = 2_000_000

STORAGES = {
    "torch.DoubleStorage": "F64", "torch.FloatStorage": "F32", "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16", "torch.LongStorage": "I64", "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16", "torch.CharStorage": "I8", "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL",
}  # fmt: skip
TENSOR = "torch._utils._rebuild_tensor_v2"
PARAMETER = "torch._utils._rebuild_parameter"
ORDERED_DICT = "collections.OrderedDict"
GLOBALS = frozenset({*STORAGES, TENSOR, PARAMETER, ORDERED_DICT})


@dataclass(frozen=True, slots=True)
class Token:
    """A name that the pickle asked for."""

    name: str


@dataclass(frozen=True, slots=True)
class StorageRef:
    """What a persistent id says of a storage: `numel` elements of a safetensors type under `key`."""

    key: str
    dtype: str
    numel: int


@dataclass(frozen=True, slots=True)
class TensorRef:
    """The arguments of a rebuilt tensor, in elements of its storage. Nothing has been checked against the storage."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Malformed(Exception):
    """Says what of the pickle is not understood."""


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensors by name, without reading a value. InputRefused for everything but a state dict of row-major tensors."""
    size = path.stat().st_size
    with path.open("rb") as file:
        stream = BytesIO(file.read(PICKLES_LIMIT))
    if stream.read(1) != b"\x80":
        raise InputRefused(
            f"{path} is not a zip file and not PyTorch's format before 1.6",
            expected="a .bin written by torch.save",
            todo="fetch it again",
        )
    stream.seek(0)
    try:
        state, keys, storages = _read_pickles(stream)
        starts = _storage_starts(path, size, stream.tell(), keys, storages)
        return {name: tensor_info(path, name, tensor, starts) for name, tensor in state.items()}
    except Malformed as error:
        raise InputRefused(
            f"{path} is not a zip file, and as PyTorch's format before 1.6 it is refused: {error}",
            expected="a state dict of tensors, written by torch.save",
            todo="fetch it again; if it still fails, do not load it and get the model as safetensors",
        ) from error


def _read_pickles(stream: BytesIO) -> tuple[dict[str, object], list[str], dict[str, StorageRef]]:
    """The state dict, the storage keys in the order of the file, and the storages that the state dict refers to."""
    magic = interpret(stream)
    if type(magic) is not int or magic != MAGIC:
        raise Malformed("it does not begin with the magic number of torch.save")
    protocol = interpret(stream)
    if type(protocol) is not int or protocol != PROTOCOL:
        raise Malformed(f"its protocol is not {PROTOCOL}")
    machine = interpret(stream)
    if type(machine) is not dict or machine.get("little_endian") is not True:
        raise Malformed("it does not say that it was written on a little-endian machine")
    storages: dict[str, StorageRef] = {}
    state = interpret(stream, storages)
    if not isinstance(state, dict):
        raise Malformed(f"it holds a {type(state).__name__}, not a state dict")
    keys = interpret(stream)
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise Malformed("its list of storages is not a list of names")
    if len(set(keys)) != len(keys) or set(keys) != set(storages):
        raise Malformed("its list of storages is not that of its tensors")
    return state, keys, storages


def _storage_starts(
    path: Path, size: int, at: int, keys: Iterable[str], storages: dict[str, StorageRef]
) -> dict[str, int]:
    """Where each storage's elements begin. Counts must be what the tensors say, and the file must end with the last."""
    starts = {}
    with path.open("rb") as file:
        for key in keys:
            storage = storages[key]
            file.seek(at)
            count = file.read(8)
            starts[key] = at + 8
            at += 8 + storage.numel * item_size(storage.dtype)
            if at > size:
                raise Malformed(f"it has {size} bytes, and a storage ends at byte {at}: it is truncated")
            if int.from_bytes(count, "little", signed=True) != storage.numel:
                raise Malformed(f"a storage of {storage.numel} elements is stored with another count")
    if at != size:
        raise Malformed(f"{size - at} bytes follow its last storage")
    return starts


def tensor_info(path: Path, name: str, value: object, starts: dict[str, int]) -> TensorInfo:
    if not isinstance(value, TensorRef):
        raise InputRefused(f"{path}: {name[:200]!r} is a {type(value).__name__}", expected="a tensor under every name")
    storage, numel = value.storage, math.prod(value.shape)
    row_major, step = [], 1
    for length in reversed(value.shape):
        row_major.append(step)
        step *= length
    pairs = zip(value.stride, reversed(row_major), value.shape, strict=True)
    if numel and any(stride != wanted for stride, wanted, length in pairs if length != 1):
        raise InputRefused(
            f"{path}: {name[:200]!r} is stored with strides {value.stride}",
            expected="row-major tensors",
            todo="save the model again with tensor.contiguous()",
        )
    if numel and value.offset + numel > storage.numel:
        raise InputRefused(f"{path}: {name[:200]!r} lies outside its storage of {storage.numel} elements")
    size = item_size(storage.dtype)
    offset = starts[storage.key] + (value.offset * size if numel else 0)
    return TensorInfo(name, storage.dtype, value.shape, path, offset, numel * size)


def interpret_bytes(data: bytes, storages: dict[str, StorageRef]) -> object:
    """The value of a pickle that is a file of its own, as in a zip `.bin`."""
    return interpret(BytesIO(data), storages)


def interpret(stream: BytesIO, storages: dict[str, StorageRef] | None = None) -> object:
    """The value of the pickle at the stream's position, which is left behind it. Raises Malformed.

    `storages` collects the storages that it refers to; without it the pickle may not refer to any.
    """
    machine = _Machine({} if storages is None else storages, storages is not None)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count > OPCODES_LIMIT:
                raise Malformed(f"a pickle has more than {OPCODES_LIMIT} opcodes")
            machine.step(opcode.name, argument)
        (value,) = machine.stack
    except (ValueError, IndexError, KeyError) as error:  # truncated, unknown opcode, empty stack, unknown memo
        detail = str(error) or "an empty stack"
        raise Malformed(f"a pickle is malformed, truncated or too long ({detail[:120]})") from error
    return value


CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple,
}  # fmt: skip
LITERALS = frozenset(
    {
        "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT",
        "BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING",
    }
)  # fmt: skip


class _Machine:
    """The stack of a pickle, for the opcodes that torch.save writes in protocols 2 to 4."""

    def __init__(self, storages: dict[str, StorageRef], may_refer: bool) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages = storages
        self.may_refer = may_refer

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in LITERALS:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name]())
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(self.pop_to_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(self.pop(int(name[-1]))))
        elif name in ("APPEND", "APPENDS"):
            items = self.pop(1) if name == "APPEND" else self.pop_to_mark()
            _expect(type(stack[-1]) is list, "appends to what is not a list")
            stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self.pop(2) if name == "SETITEM" else self.pop_to_mark()
            _set_items(stack[-1], items[::2], items[1::2])
        elif name == "GLOBAL":
            stack.append(_token(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(_token(*self.pop(2)))
        elif name == "BINPERSID":
            stack.append(self.storage(self.pop(1)[0]))
        elif name == "REDUCE":
            stack.append(_rebuild(*self.pop(2)))
        elif name == "BUILD":  # model.state_dict() carries _metadata, which says nothing about the weights
            self.pop(1)
            _expect(type(stack[-1]) is OrderedDict, "sets attributes")
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise Malformed(f"a pickle uses {name}, which a state dict does not need")

    def pop(self, count: int) -> list[Any]:
        floor = self.marks[-1] if self.marks else 0
        _expect(len(self.stack) - count >= floor, "takes more from its stack than there is")
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def pop_to_mark(self) -> list[Any]:
        _expect(bool(self.marks), "takes from its stack up to a mark that is not there")
        start = self.marks.pop()
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def storage(self, value: Any) -> StorageRef:
        _expect(self.may_refer, "refers to a storage outside the state dict")
        known = type(value) is tuple and len(value) in (5, 6) and type(value[0]) is str and value[0] == "storage"
        _expect(known, "refers to what is not a storage")
        parts: tuple[Any, ...] = value
        _, kind, key, _, numel = parts[:5]
        view = parts[5] if len(parts) > 5 else None  # a zip file has none
        _expect(type(kind) is Token and kind.name in STORAGES, "refers to a storage of unknown type")
        _expect(type(key) is str and _is_count(numel), "describes a storage without name or size")
        _expect(view is None, "uses the storage views of PyTorch 0.3")
        found = StorageRef(key, STORAGES[kind.name], numel)
        _expect(self.storages.setdefault(key, found) == found, "describes one storage in two ways")
        return found


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Malformed(f"a pickle {otherwise}")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_text(value: object) -> bool:
    """True for a string that UTF-8 can hold; a pickle may also hold lone surrogates."""
    return type(value) is str and value.encode(errors="ignore").decode() == value


def _token(module: object, name: object) -> Token:
    _expect(_is_text(module) and _is_text(name), "asks for something without a name")
    full = f"{module}.{name}"
    _expect(full in GLOBALS, f"asks for {full[:120]!r}, which a state dict does not need")
    return Token(full)


def _set_items(target: Any, keys: list[Any], values: list[Any]) -> None:
    _expect(isinstance(target, dict) and len(keys) == len(values), "sets an item of what is not a dictionary")
    # only strings: hashing tuples that nest one another takes exponential time
    _expect(all(_is_text(key) for key in keys), "has a key that is not a string")
    target.update(zip(keys, values, strict=True))


def _rebuild(token: Any, arguments: Any) -> object:
    """What the functions of GLOBALS would return, as references."""
    _expect(type(token) is Token and type(arguments) is tuple, "calls what cannot be called")
    if token.name == TENSOR:
        return _tensor_ref(arguments)
    if token.name == PARAMETER:
        _expect(len(arguments) == 3 and type(arguments[0]) is TensorRef, "rebuilds a parameter of what is no tensor")
        return arguments[0]
    _expect(token.name == ORDERED_DICT and len(arguments) <= 1, f"calls {token.name}")
    result: OrderedDict[str, object] = OrderedDict()
    pairs: Any = arguments[0] if arguments else []
    _expect(type(pairs) is list, "fills a dictionary with what is not a list")
    for pair in pairs:  # as Python 2 wrote it
        _expect(type(pair) is list and len(pair) == 2, "fills a dictionary with what are not pairs")
        _set_items(result, pair[:1], pair[1:])
    return result


def _tensor_ref(values: tuple[Any, ...]) -> TensorRef:
    _expect(5 <= len(values) <= 7, "rebuilds a tensor of too few or too many arguments")
    storage, offset, shape, stride = values[:4]
    _expect(type(storage) is StorageRef, "rebuilds a tensor without a storage")
    _expect(type(shape) is tuple and type(stride) is tuple, "rebuilds a tensor without shape and strides")
    _expect(len(shape) == len(stride) <= 64, "rebuilds a tensor of too many dimensions")
    _expect(all(map(_is_count, (offset, *shape, *stride))), "rebuilds a tensor of a size that cannot be")
    return TensorRef(storage, offset, shape, stride)
