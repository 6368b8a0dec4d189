"""Pickles in `.bin` files of both formats: payloads, bombs and junk, as the base's weights and as an adapter's."""

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.hostile.case import Case
from tests.hostile.material import Tree, base_as_bin

PROTO = b"\x80\x02"
COMMAND = b"touch outside_ran; touch ../outside_ran"


def text(value: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value


def call(module: bytes, name: bytes, argument: bytes) -> bytes:
    """module.name(argument), as REDUCE."""
    return b"c" + module + b"\n" + name + b"\n" + argument + b"\x85R"


SHELL = call(b"os", b"system", text(COMMAND))
DEEP = b"N\x85" + b"q\x01h\x01\x86" * 60  # t = (t, t), sixty times: its hash or its text takes 2**60 steps

# What stands in place of the state dict; each is a whole pickle without its STOP.
PROGRAMS: dict[str, bytes] = {
    "os.system": SHELL,
    "posix.system": call(b"posix", b"system", text(COMMAND)),
    "os.system under a tensor's name": b"}" + text(b"transformer.wte.weight") + SHELL + b"s",
    "builtins.eval": call(b"builtins", b"eval", text(b"__import__('os').system('touch outside_ran')")),
    "builtins.exec": call(b"builtins", b"exec", text(b"import os; os.system('touch outside_ran')")),
    "__builtin__.eval of Python 2": call(b"__builtin__", b"eval", text(b"1")),
    "builtins.__import__": call(b"builtins", b"__import__", text(b"os")),
    "builtins.getattr": call(b"builtins", b"getattr", text(b"x")),
    "builtins.open for writing": b"cbuiltins\nopen\n" + text(b"outside_ran") + text(b"w") + b"\x86R",
    "subprocess.Popen": call(b"subprocess", b"Popen", text(COMMAND)),
    "runpy.run_path": call(b"runpy", b"run_path", text(b"evil.py")),
    "importlib.import_module": call(b"importlib", b"import_module", text(b"os")),
    "shutil.rmtree": call(b"shutil", b"rmtree", text(b"..")),
    "socket.create_connection": call(b"socket", b"create_connection", text(b"x")),
    "webbrowser.open": call(b"webbrowser", b"open", text(b"http://x")),
    "torch.load": call(b"torch", b"load", text(b"x")),
    "torch.hub.load": call(b"torch.hub", b"load", text(b"x")),
    "torch._utils._rebuild_tensor": call(b"torch._utils", b"_rebuild_tensor", text(b"x")),
    "numpy.load": call(b"numpy", b"load", text(b"x")),
    "a name of many parts": b"\x80\x04" + b"\x8c\x08builtins\x8c\x0beval.__call" + b"\x93.",
    "STACK_GLOBAL of os.system": b"\x80\x04\x8c\x02os\x8c\x06system\x93" + text(COMMAND) + b"\x85R",
    "INST": b"(" + text(COMMAND) + b"ios\nsystem\n",
    "OBJ": b"(cos\nsystem\n" + text(COMMAND) + b"o",
    "NEWOBJ": b"cos\nsystem\n" + text(COMMAND) + b"\x85\x81",
    "NEWOBJ_EX": b"\x80\x04cos\nsystem\n" + text(COMMAND) + b"\x85}\x92",
    "EXT1": b"\x82\x01",
    "EXT4": b"\x84\x01\x00\x00\x00",
    "nested REDUCE": b"ccollections\nOrderedDict\n" + SHELL + b"\x85R",
    "REDUCE of a result": b"ccollections\nOrderedDict\n)R)R",
    "BUILD on a dictionary": b"}}" + text(b"x") + b"Nsb",
    "BUILD with state": b"ccollections\nOrderedDict\n)R}" + text(b"__class__") + b"cos\nsystem\nsb",
    "BUILD of a payload": b"ccollections\nOrderedDict\n)R" + SHELL + b"b",
    "PERSID": b"Pstorage\n",
    "BINPERSID of text": text(b"storage") + b"Q",
    "BINPERSID of a payload": SHELL + b"Q",
    "BINPERSID of a type that is none": b"(" + text(b"storage") + b"cos\nsystem\n" + text(b"0") + text(b"cpu")
    + b"K\x04tQ",
    "a bytearray of 100 GB": call(b"builtins", b"bytearray", b"\x8a\x05" + (10**11).to_bytes(5, "little")),
    "bytes of 4 GB announced": b"B\xff\xff\xff\xff",
    "BYTEARRAY8 of 2**60 bytes": b"\x80\x05\x96" + struct.pack("<Q", 1 << 60),
    "BINUNICODE8 of 2**60 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60),
    "LONG4 of 2 GB announced": b"\x8b\xff\xff\xff\x7f",
    "LONG4 of a million bytes": b"\x8b\x40\x42\x0f\x00" + b"\x7f" * 1_000_000,
    "a memo of 2**31": b"Nr\xff\xff\xff\x7f",
    "a tuple that doubles": DEEP,
    "a key that doubles": b"}" + DEEP + b"Ns",
    "a list that holds itself": b"]q\x00h\x00a",
    "lists that double": b"]" + b"q\x01(h\x01h\x01e" * 40,
    "a million opcodes": b"]" + b"(Ne" * 700_000,
    "tuples in tuples": b")" + b"\x85" * 100_000,
    "dictionaries in dictionaries": b"}" + b"}" * 1000 + text(b"x"),
    "marks alone": b"(" * 100_000,
    "no value": b"",
    "two values": b"NN",
    "a get of nothing": b"h\x09",
    "STOP at once": b".",
    "opcode 255": b"\xff",
    "protocol 255": b"\x80\xffN",
    "a string of Python 2 with code": b"S'__import__(\"os\").system(\"touch outside_ran\")'\n",
    "UNICODE with escapes": b"V\\ud800\n",
    "GLOBAL without a name": b"c\n\n",
    "GLOBAL of bytes that are not ASCII": b"c\xff\xfe\n\xff\n",
    "a number of a million digits": b"I" + b"9" * 1_000_000 + b"\n",
    "an optimizer": b"}(" + text(b"state") + b"}" + text(b"param_groups") + b"]}" + text(b"lr")
    + b"G?PbM\xd2\xf1\xa9\xfcsau",
    "a tensor without a storage": b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00K\x01\x85K\x01\x85\x89NtR",
    "a state dict of numbers": b"}" + text(b"transformer.wte.weight") + b"K\x01s",
    "a state dict of lists": b"}" + text(b"transformer.wte.weight") + b"]s",
    "an empty state dict": b"}",
}  # fmt: skip


def zipped(path: Path, change: Callable[[bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """The archive with another data.pkl."""
    target = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content) if name.endswith("data.pkl") else content)
    path.write_bytes(target.getvalue())


def adapter_as_bin(tree: Tree) -> Path:
    safetensors = tree.adapter / "adapter_model.safetensors"
    torch.save(load_file(safetensors), tree.adapter / "adapter_model.bin")
    safetensors.unlink()
    return tree.adapter / "adapter_model.bin"


MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # what torch.save wrote before 1.6
PROTOCOL = b"\x80\x02M\xe9\x03."
MACHINE = b"\x80\x02}" + text(b"little_endian") + b"\x88s."


def old_format(program: bytes) -> bytes:
    return MAGIC + PROTOCOL + MACHINE + PROTO + program + b"." + PROTO + b"]."


def in_zip(program: bytes) -> Callable[[Tree], object]:
    return lambda tree: zipped(base_as_bin(tree), lambda _: PROTO + program + b".")


def in_old_format(program: bytes) -> Callable[[Tree], object]:
    return lambda tree: adapter_as_bin(tree).write_bytes(old_format(program))


def in_first_pickle(tree: Tree) -> None:
    adapter_as_bin(tree).write_bytes(PROTO + SHELL + b"." + old_format(b"}"))


def bomb(tree: Tree) -> None:
    """A data.pkl of 512 MB that takes half a megabyte in the file."""
    path = base_as_bin(tree)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x/data.pkl", "w") as file:
        for _ in range(32):
            file.write(bytes(16 << 20))


def lying_size(tree: Tree) -> None:
    """A data.pkl that says it is small and inflates to 200 MB: the size comes from the file's own directory."""
    path = base_as_bin(tree)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(200 << 20))
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", 200 << 20), struct.pack("<I", 1000)))


def archive(change: Callable[[zipfile.ZipFile], None]) -> Callable[[Tree], object]:
    """The base's archive with records added."""

    def damage(tree: Tree) -> None:
        with zipfile.ZipFile(base_as_bin(tree), "a") as opened:
            change(opened)

    return damage


def edited(change: Callable[[bytes], bytes]) -> Callable[[Tree], object]:
    def damage(tree: Tree) -> None:
        path = base_as_bin(tree)
        path.write_bytes(change(path.read_bytes()))

    return damage


def far_record(data: bytes) -> bytes:
    """The directory says that its first record begins at 2 GB."""
    at = data.index(b"PK\x01\x02") + 42
    return data[:at] + b"\xff\xff\xff\x7f" + data[at + 4 :]


def many_records(opened: zipfile.ZipFile) -> None:
    for number in range(20_000):
        opened.writestr(f"x/data/{number}", b"")


ARCHIVES: dict[str, Callable[[Tree], object]] = {
    "a zip bomb": bomb,
    "a size that lies": lying_size,
    "two data.pkl": archive(lambda opened: opened.writestr("other/data.pkl", PROTO + SHELL + b".")),
    "a record twice": archive(lambda opened: opened.writestr(opened.namelist()[0], PROTO + SHELL + b".")),
    "big-endian": archive(lambda opened: opened.writestr(opened.namelist()[0].split("/")[0] + "/byteorder", b"big")),
    "compressed": lambda tree: zipped(base_as_bin(tree), lambda data: data, zipfile.ZIP_DEFLATED),
    "truncated": edited(lambda data: data[: len(data) // 2]),
    "only the local headers": edited(lambda data: data[:-22]),
    "a record outside the file": edited(far_record),
    "zeros": edited(lambda data: bytes(len(data))),
    "text": edited(lambda data: b"import os\n"),
    "nothing": edited(lambda data: b""),
    "a tar file": edited(lambda data: b"storages".ljust(257, b"\0") + b"ustar" + bytes(1000)),
    "safetensors": lambda tree: (tree.base / "model.safetensors").rename(tree.base / "pytorch_model.bin"),
}
CASES = [
    *(Case(f"pickle, zip: {name}", in_zip(program), ("inspect", "merge")) for name, program in PROGRAMS.items()),
    *(Case(f"pickle, old: {name}", in_old_format(program), ("inspect",)) for name, program in PROGRAMS.items()
      if name != "a million opcodes"),
    Case("pickle, old: a payload before the magic number", in_first_pickle, ("inspect", "merge", "verify")),
    *(Case(f"archive: {name}", damage, ("inspect", "export")) for name, damage in ARCHIVES.items()),
    Case("archive: many records", archive(many_records), ("inspect",), codes=(0, 4)),
]  # fmt: skip
