"""Headers of safetensors files: base, adapter, bundle and captured reference are read by their own reader each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile.case import Case, dump
from tests.hostile.material import Tree


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(path: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)


def entry_of(header: dict[str, Any]) -> dict[str, Any]:
    return next(value for key, value in header.items() if key != "__metadata__")


def entry(**changes: Any) -> Callable[[Path], object]:
    """The first tensor's entry with other values; a value of ... removes the key."""

    def damage(path: Path) -> None:
        header, data = split(path)
        place = entry_of(header)
        for key, value in changes.items():
            place.pop(key, None)
            if value is not ...:
                place[key] = value
        join(path, dump(header), data)

    return damage


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        document, data = split(path)
        join(path, dump(change(document) or document), data)

    return damage


def raw(make: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """The header's bytes changed, with a true length before them."""

    def damage(path: Path) -> None:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        join(path, make(data[8 : 8 + length]), data[8 + length :])

    return damage


def file(make: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(make(path.read_bytes()))


def twice(path: Path) -> None:
    """One name, two entries: the last would win for one reader and the first for another."""
    document, data = split(path)
    name = next(key for key in document if key != "__metadata__")
    text = dump(document)
    join(path, text[:-1] + b", " + dump({name: document[name]})[1:], data)


def overlap(document: dict[str, Any]) -> None:
    entries = [value for key, value in document.items() if key != "__metadata__"]
    size = entries[1]["data_offsets"][1] - entries[1]["data_offsets"][0]
    begin = max(0, entries[1]["data_offsets"][0] - 8)
    entries[1]["data_offsets"] = [begin, begin + size]


def hole(document: dict[str, Any]) -> None:
    last = max((value for key, value in document.items() if key != "__metadata__"), key=lambda e: e["data_offsets"])
    last["data_offsets"] = [place + 8 for place in last["data_offsets"]]


def many(document: dict[str, Any]) -> dict[str, Any]:
    """Ten thousand tensors of no bytes, 0.6 MB of header."""
    return document | {f"x{i}": {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]} for i in range(10_000)}


DAMAGES: dict[str, Callable[[Path], object]] = {
    "overlapping tensors": header(overlap),
    "a hole": header(hole),
    "a huge offset": entry(data_offsets=[0, 10**18]),
    "an offset of 10**400": entry(data_offsets=[0, 10**400]),
    "a negative offset": entry(data_offsets=[-8, 8]),
    "begin after end": entry(data_offsets=[64, 0]),
    "offsets of floats": entry(data_offsets=[0.0, 64.0]),
    "offsets of booleans": entry(data_offsets=[False, True]),
    "offsets of text": entry(data_offsets=["0", "64"]),
    "three offsets": entry(data_offsets=[0, 1, 2]),
    "offsets in an object": entry(data_offsets={"begin": 0, "end": 64}),
    "no offsets": entry(data_offsets=...),
    "a huge shape": entry(shape=[1 << 40, 1 << 40]),
    "a product that overflows": entry(shape=[1 << 32, 1 << 32], data_offsets=[0, 0]),
    "a zero that hides a product": entry(shape=[0, 1 << 62, 1 << 62], data_offsets=[0, 0]),
    "ten thousand dimensions": entry(shape=[1] * 10_000),
    "negative sizes": entry(shape=[-4, -4]),
    "a shape of text": entry(shape="4, 4"),
    "a shape of nulls": entry(shape=[None]),
    "a shape of NaN": entry(shape=[float("nan")]),
    "a shape of Infinity": entry(shape=[float("inf")]),
    "no shape": entry(shape=...),
    "an unknown type": entry(dtype="F7"),
    "a type of another size": entry(dtype="F64"),
    "a type that is a number": entry(dtype=16),
    "a type that is a list": entry(dtype=["F16"]),
    "a type with code": entry(dtype="__import__('os').system('touch outside/ran')"),
    "no type": entry(dtype=...),
    "a key too many": entry(code="eval"),
    "an entry that is a list": header(lambda h: h | {"extra": [1, 2]}),
    "an entry that is null": header(lambda h: h | {"extra": None}),
    "metadata that is a list": header(lambda h: h | {"__metadata__": ["pt"]}),
    "metadata of numbers": header(lambda h: h | {"__metadata__": {"format": 1}}),
    "nested metadata": header(lambda h: h | {"__metadata__": {"a": {"b": "c"}}}),
    "a name twice": twice,
    "half a surrogate pair": raw(lambda h: h.rstrip()[:-1] + b', "\\ud800": 1}'),
    "bytes that are not UTF-8": raw(lambda h: h.replace(b'"dtype"', b'"dty\xff\xfe"', 1)),
    "UTF-16": raw(lambda h: h.decode().encode("utf-16")),
    "a byte order mark": raw(lambda h: b"\xef\xbb\xbf" + h),
    "a header that nests 100 levels": raw(lambda h: h.rstrip()[:-1] + b', "x": ' + b"[" * 100 + b"]" * 100 + b"}"),
    "a header that nests 100000 levels": raw(
        lambda h: h.rstrip()[:-1] + b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    ),
    "an array": raw(lambda h: b"[" + h + b"]"),
    "a number": raw(lambda h: b"12345678"),
    "a number of a million digits": raw(lambda h: h.rstrip()[:-1] + b', "x": ' + b"9" * 10**6 + b"}"),
    "code": raw(lambda h: b'__import__("os").system("touch outside/ran")'),
    "no JSON": raw(lambda h: h.rstrip()[:-1]),
    "JSON and more": raw(lambda h: h + h),
    "an empty header": raw(lambda h: b""),
    "spaces alone": raw(lambda h: b" " * 64),
    "10000 empty tensors": header(many),
    "a header bomb of 90 MB": raw(lambda h: h + b" " * (90 << 20)),
    "a length of 2**63": file(lambda d: (1 << 63).to_bytes(8, "little") + d[8:]),
    "a length of 2**64 - 1": file(lambda d: b"\xff" * 8 + d[8:]),
    "a length past the end": file(lambda d: (len(d)).to_bytes(8, "little") + d[8:]),
    "a length of nothing": file(lambda d: bytes(8) + d[8:]),
    "a length one short": file(lambda d: (int.from_bytes(d[:8], "little") - 1).to_bytes(8, "little") + d[8:]),
    "a length one long": file(lambda d: (int.from_bytes(d[:8], "little") + 1).to_bytes(8, "little") + d[8:]),
    "trailing bytes": file(lambda d: d + b"evil"),
    "truncated data": file(lambda d: d[:-3]),
    "a truncated header": file(lambda d: d[:40]),
    "seven bytes": file(lambda d: d[:7]),
    "no bytes": file(lambda d: b""),
    "a zip file": file(lambda d: b"PK\x03\x04" + d),
    "a pickle": file(lambda d: b"\x80\x04cos\nsystem\n."),
}
# Read, for what they are is only unusual: names without bytes, and spaces, which the format allows for alignment.
ALLOWED = ("10000 empty tensors", "a header bomb of 90 MB")


def _on(place: str, commands: tuple[str, ...], skip: tuple[str, ...] = ()) -> list[Case]:
    def on(damage: Callable[[Path], object]) -> Callable[[Tree], object]:
        return lambda tree: damage(tree.root / place)

    return [
        Case(
            f"safetensors, {place}: {name}",
            on(damage),
            commands,
            codes=(0, 4) if name in ALLOWED else (4,),
        )
        for name, damage in DAMAGES.items()
        if name not in skip
    ]


CASES = [
    *_on("base/model.safetensors", ("inspect", "merge")),
    *_on("adapter/adapter_model.safetensors", ("inspect",), skip=("a header bomb of 90 MB",)),
    *_on("int8/weights.safetensors", ("generate int8", "verify int8"), skip=ALLOWED),
    *_on("reference", ("verify reference",), skip=ALLOWED),
]
