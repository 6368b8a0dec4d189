"""What a bundle brings along: its manifest, its graphs, names inside weights.safetensors, adapters for run time."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from onnx import helper

from tests.hostile.case import Case, dump, edited, with_key, without
from tests.hostile.material import Tree
from tests.hostile.safetensors_headers import join, split

NATIVE, INT8, SEPARATE = "export-native-cpu", "export-int8-cpu", "export-native-cpu"
NAN = float("nan")
READERS = ("generate", "serve", "verify", "verify-manifest", "unmerge", "export merged")


def manifest(change: Callable[[Any], Any]) -> Callable[[Tree], object]:
    return lambda tree: edited(tree.merged / "exporter.json", change)


def manifest_bytes(data: bytes) -> Callable[[Tree], object]:
    return lambda tree: (tree.merged / "exporter.json").write_bytes(data)


def relisted(directory: Path, name: str) -> None:
    """The manifest says of `name` what the file now is: a hostile bundle brings a manifest of its own."""
    data = (directory / name).read_bytes()
    status = (directory / name).stat()
    entry = {
        "size": len(data), "mtime_ns": status.st_mtime_ns, "inode": status.st_ino,
        "head_sha256": hashlib.sha256(data[: 1 << 16]).hexdigest(), "sha256": hashlib.sha256(data).hexdigest(),
    }  # fmt: skip

    def change(document: Any) -> None:
        for section in document["stages"].values():
            if name in section.get("files", {}):
                section["files"][name] = entry

    edited(directory / "exporter.json", change)


def graph(change: Callable[[onnx.ModelProto, Tree], object]) -> Callable[[Tree], object]:
    """The native graph changed, and listed as it is now."""

    def damage(tree: Tree) -> None:
        path = tree.merged / "model.onnx"
        model = onnx.load(path, load_external_data=False)
        change(model, tree)
        path.write_bytes(model.SerializeToString())
        relisted(tree.merged, "model.onnx")

    return damage


def graph_bytes(make: Callable[[bytes], bytes]) -> Callable[[Tree], object]:
    def damage(tree: Tree) -> None:
        path = tree.merged / "model.onnx"
        path.write_bytes(make(path.read_bytes()))
        relisted(tree.merged, "model.onnx")

    return damage


def first_external(model: onnx.ModelProto) -> Any:
    return next(tensor for tensor in model.graph.initializer if tensor.external_data)


def external(**values: Any) -> Callable[[onnx.ModelProto, Tree], object]:
    """The first weight's external data with other values; a value may be made from the tree."""

    def change(model: onnx.ModelProto, tree: Tree) -> None:
        for entry in first_external(model).external_data:
            if entry.key in values:
                value = values[entry.key]
                entry.value = value(tree) if callable(value) else value

    return change


def elsewhere(relative: bool) -> Callable[[Tree], str]:
    """A copy of the very weights in the directory outside: only where it lies is wrong."""

    def place(tree: Tree) -> str:
        shutil.copy(tree.merged / "model.safetensors", tree.outside / "secret")
        path = tree.outside / "secret"
        return os.path.relpath(path, tree.merged) if relative else str(path)

    return place


def add_node(node: onnx.NodeProto) -> Callable[[onnx.ModelProto, Tree], object]:
    return lambda model, tree: model.graph.node.append(node)


def endless(model: onnx.ModelProto, tree: Tree) -> None:
    """A Loop of 2**62 rounds in front of the logits."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["c2"])],
        "body",
        [
            helper.make_tensor_value_info("i", onnx.TensorProto.INT64, []),
            helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("c2", onnx.TensorProto.BOOL, [])],
    )
    rounds = helper.make_tensor("evil_rounds", onnx.TensorProto.INT64, [], [1 << 62])
    going = helper.make_tensor("evil_going", onnx.TensorProto.BOOL, [], [True])
    model.graph.initializer.extend([rounds, going])
    model.graph.node.append(helper.make_node("Loop", ["evil_rounds", "evil_going"], [], body=body))


def constant_in_subgraph(model: onnx.ModelProto, tree: Tree) -> None:
    """External data in an attribute's tensor, where a look at the initializers does not find it."""
    tensor = onnx.TensorProto(name="evil", data_type=onnx.TensorProto.FLOAT, dims=[4])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": elsewhere(False)(tree), "offset": "0", "length": "16"}.items():
        tensor.external_data.add(key=key, value=value)
    model.graph.node.append(helper.make_node("Constant", [], ["evil"], value=tensor))


def huge_constant(model: onnx.ModelProto, tree: Tree) -> None:
    shape = helper.make_tensor("evil_shape", onnx.TensorProto.INT64, [1], [1 << 42])
    model.graph.initializer.append(shape)
    model.graph.node.append(helper.make_node("ConstantOfShape", ["evil_shape"], ["evil"]))


GRAPHS: dict[str, Callable[[onnx.ModelProto, Tree], object]] = {
    "weights at an absolute path": external(location=elsewhere(False)),
    "weights at a path upwards": external(location=elsewhere(True)),
    "weights in /dev/zero": external(location="/dev/zero"),
    "weights in /proc/self/mem": external(location="/proc/self/mem"),
    "weights in a file that is not there": external(location="other.safetensors"),
    "weights in a name of 5000 letters": external(location="x" * 5000),
    "weights in the tokenizer": external(location="tokenizer.json"),
    "weights in the directory": external(location="."),
    "weights in nothing": external(location=""),
    "weights at a negative offset": external(offset="-4096"),
    "weights at an offset of 2**63": external(offset=str(1 << 63)),
    "weights at an offset of words": external(offset="here"),
    "weights of a length of 2**63": external(length=str(1 << 63)),
    "weights of a negative length": external(length="-1"),
    "weights of a length of words": external(length="all"),
    "an operator of another domain": add_node(helper.make_node("Evil", [], ["evil"], domain="evil.code")),
    "an unknown operator": add_node(helper.make_node("Evil", [], ["evil"])),
    "a loop of 2**62 rounds": endless,
    "external data in a node": constant_in_subgraph,
    "a constant of 16 TB": huge_constant,
    "no inputs": lambda model, tree: model.graph.ClearField("input"),
    "no outputs": lambda model, tree: model.graph.ClearField("output"),
    "no nodes": lambda model, tree: model.graph.ClearField("node"),
    "no graph": lambda model, tree: model.ClearField("graph"),
    "opset 10**6": lambda model, tree: setattr(model.opset_import[0], "version", 10**6),
    "a node that reads itself": add_node(helper.make_node("Add", ["evil", "evil"], ["evil"])),
}
GRAPH_BYTES: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(1000),
    "text": lambda data: b"import os",
    "a length of 2**63": lambda data: b"\x3a" + b"\xff" * 8 + b"\x7f" + data,
    "groups in groups": lambda data: b"\x0b" * 100_000,
    "a pickle": lambda data: b"\x80\x04cos\nsystem\n.",
}


def entries(document: Any) -> dict[str, Any]:
    return document["stages"][NATIVE]["files"]


def every_file(entry: Any) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        for section in document["stages"].values():
            section["files"] = dict.fromkeys(section["files"], entry)

    return change


def rename_file(name: str) -> Callable[[Any], None]:
    """Every stage lists `name` in place of the graph."""

    def change(document: Any) -> None:
        for section in document["stages"].values():
            section["files"][name] = next(iter(section["files"].values()))

    return change


MANIFESTS: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
    "an absolute path": (rename_file("/etc/passwd"), ("verify", "verify-manifest")),
    "a path upwards": (rename_file("../../../outside0/secret"), ("verify", "verify-manifest")),
    "a path upwards in its middle": (rename_file("x/../../../secret"), ("verify", "verify-manifest")),
    "a zero byte": (rename_file("x\0y"), ("verify", "verify-manifest")),
    "no name": (rename_file(""), ("verify", "verify-manifest")),
    "itself as a file": (rename_file("."), ("verify", "verify-manifest")),
    "half a surrogate pair": (rename_file("\ud800"), ("verify", "verify-manifest")),
    "a name of 5000 letters": (rename_file("x" * 5000), ("verify", "verify-manifest")),
    "a file that is not there": (rename_file("ghost"), ("verify", "verify-manifest")),
    "another format": (with_key("format", value=2), READERS),
    "a format of text": (with_key("format", value="1"), READERS),
    "no stages": (without("stages"), READERS),
    "stages that are a list": (with_key("stages", value=[]), READERS),
    "stages that are numbers": (with_key("stages", value={NATIVE: 7, "merge": 7}), READERS),
    "files that are a list": (with_key("stages", NATIVE, "files", value=["model.onnx"]), READERS),
    "files that are text": (with_key("stages", NATIVE, "files", value={"model.onnx": "x"}), READERS),
    "no hashes": (every_file({}), ("generate", "verify", "verify-manifest")),
    "hashes that are numbers": (every_file({"size": 1, "sha256": 7}), ("generate", "verify", "verify-manifest")),
    "hashes that are lists": (every_file({"size": [], "sha256": [[]]}), ("generate", "verify", "verify-manifest")),
    "another hash": (every_file({"size": 1, "sha256": "0" * 64}), ("generate", "verify", "verify-manifest")),
    "a graph that is elsewhere": (with_key("stages", NATIVE, "graph", value="/tmp/model.onnx"), ("generate",)),
    "a graph upwards": (with_key("stages", NATIVE, "graph", value="../int8/model.onnx"), ("generate",)),
    "a graph that is a number": (with_key("stages", NATIVE, "graph", value=7), ("generate",)),
    "a graph with a zero byte": (with_key("stages", NATIVE, "graph", value="a\0b"), ("generate",)),
    "no graph": (without("stages", NATIVE, "graph"), ("generate",)),
    "an unknown target": (with_key("stages", NATIVE, "target", value="tpu"), ("generate",)),
    "a target that is a list": (with_key("stages", NATIVE, "target", value=["cpu"]), ("generate",)),
    "an unknown precision": (with_key("stages", NATIVE, "precision", value="float3"), ("generate",)),
    "a precision that is a list": (with_key("stages", NATIVE, "precision", value=["native"]), ("generate",)),
    "optimum's precision": (with_key("stages", NATIVE, "precision", value="optimum"), ("generate",)),
    "weights that are text": (with_key("stages", NATIVE, "weights", value="model.safetensors"), ("generate",)),
    "weights that are a number": (with_key("stages", NATIVE, "weights", value=7), ("generate",)),
    "weights that are nested": (with_key("stages", NATIVE, "weights", value=[[[]]]), ("generate",)),
    "weights upwards": (with_key("stages", NATIVE, "weights", value=["../base/model.safetensors"]), ("generate",)),
    "tensors that are a list": (with_key("stages", "merge", "tensors", value=[1]), ("unmerge", "verify-manifest")),
    "tensors that are numbers": (with_key("stages", "merge", "tensors", value={"x": 1}), ("unmerge",)),
    "digests that are numbers": (
        lambda d: [entry.update(sha256=7, source_sha256=7) for entry in d["stages"]["merge"]["tensors"].values()],
        ("unmerge",),
    ),
    "another digest": (
        lambda d: [entry.update(sha256="0" * 64) for entry in d["stages"]["merge"]["tensors"].values()],
        ("unmerge", "verify-manifest"),
    ),
    "a tensor that is not there": (
        lambda d: d["stages"]["merge"]["tensors"].update(ghost={"sha256": "0" * 64}), ("verify-manifest",),
    ),
    "no proof": (without("stages", "merge", "proof"), ("unmerge",)),
    "a proof that is a number": (with_key("stages", "merge", "proof", value=7), ("unmerge",)),
    "no request": (without("stages", "merge", "request"), ("unmerge",)),
    "a request that is a list": (with_key("stages", "merge", "request", value=[1]), ("unmerge",)),
    "a weight of text": (with_key("stages", "merge", "request", "adapters", 0, "weight", value="x"), ("unmerge",)),
    "a weight of NaN": (with_key("stages", "merge", "request", "adapters", 0, "weight", value=NAN), ("unmerge",)),
    "adapters that are numbers": (with_key("stages", "merge", "request", "adapters", value=[7]), ("unmerge",)),
    "a shard of nothing": (with_key("stages", "merge", "request", "shard_size", value=0), ("unmerge",)),
    "a shard of text": (with_key("stages", "merge", "request", "shard_size", value="x"), ("unmerge",)),
    "merged onto a list": (with_key("stages", "merge", "request", "onto", value=[1]), ("verify",)),
    "merged onto something else": (with_key("stages", "merge", "request", "onto", value="int3"), ("verify", "unmerge")),
    "merged onto an object": (with_key("stages", NATIVE, "onto", value={"x": 1}), ("verify",)),
}  # fmt: skip
MANIFEST_BYTES = {
    "nothing": b"",
    "a list": b"[]",
    "null": b"null",
    "bytes": b"\xff\xfe",
    "100000 levels": b"[" * 100_000 + b"]" * 100_000,
    "900 levels": b'{"format": 1, "stages": {"x": {"y": ' + b"[" * 900 + b"]" * 900 + b"}}}",
    "a number of a million digits": b'{"format": ' + b"9" * 10**6 + b"}",
    "code": b'__import__("os").system("touch outside_ran")',
    "a pickle": b"\x80\x04cos\nsystem\n.",
    "100 MB of spaces": b'{"format": 1, "stages": {}}' + b" " * (100 << 20),
}


def weights(change: Callable[[str], str]) -> Callable[[Tree], object]:
    """Other names in the 8-bit bundle's weights, listed as they are now."""

    def damage(tree: Tree) -> None:
        path = tree.int8 / "weights.safetensors"
        header, data = split(path)
        join(path, dump({change(name): entry for name, entry in header.items()}), data)
        relisted(tree.int8, path.name)

    return damage


NAMES: dict[str, Callable[[str], str]] = {
    "of more columns than there are": lambda name: name.replace(".int8t", ".int8t.of9999"),
    "of no columns": lambda name: name.replace(".int8t", ".int8t.of0"),
    "of 10**30 columns": lambda name: name.replace(".int8t", ".int8t.of1" + "0" * 30),
    "of a million digits": lambda name: name.replace(".int8t", ".int8t.of" + "9" * 5000, 1),
    "of 4 bits": lambda name: name.replace(".int8", ".int4"),
    "not transposed": lambda name: name.replace(".int8t", ".int8"),
    "without scales": lambda name: name.replace(".scales", ".scale"),
    "scales alone": lambda name: name.replace(".int8t", ".codes") if not name.endswith("scales") else name,
    "of nothing": lambda name: "x" + name,
    "with a path": lambda name: "../../" + name,
}


def runtime_adapter(make: Callable[[bytes], bytes], *, listed: bool = True) -> Callable[[Tree], object]:
    def damage(tree: Tree) -> None:
        path = tree.separate / "adapter.onnx_adapter"
        path.write_bytes(make(path.read_bytes()))
        if listed:
            relisted(tree.separate, path.name)

    return damage


RUNTIME: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda data: b"",
    "four bytes": lambda data: data[:4],
    "half": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "0xff": lambda data: b"\xff" * len(data),
    "text": lambda data: b"import os\n" * 100,
    "a root far away": lambda data: b"\xff\xff\xff\x7f" + data[4:],
    "another magic": lambda data: data[:4] + b"EVIL" + data[8:],
    "a damaged table": lambda data: data[:16] + b"\xff" * 64 + data[80:],
    "an ONNX graph": lambda data: b"\x08\x0a" + data,
}


def other_factors(data: bytes) -> bytes:
    """Values are values; these are not numbers."""
    return data[: len(data) // 2] + b"\xff" * 64 + data[len(data) // 2 + 64 :]


def adapter_name(change: Callable[[Any], Any]) -> Callable[[Tree], object]:
    return lambda tree: edited(tree.separate / "exporter.json", change)


ADAPTER_LISTS: dict[str, Callable[[Any], Any]] = {
    "adapters that are a number": with_key("stages", SEPARATE, "adapters", value=7),
    "adapters that are a list": with_key("stages", SEPARATE, "adapters", value=["adapter"]),
    "an adapter that no file has": lambda d: d["stages"][SEPARATE]["files"].pop("adapter.onnx_adapter"),
    "an adapter without a hash": with_key("stages", SEPARATE, "files", "adapter.onnx_adapter", value={}),
}


def genai(value: Any) -> Callable[[Tree], object]:
    return lambda tree: (tree.merged / "genai_config.json").write_bytes(json.dumps(value).encode())


CASES = [
    *(Case(f"manifest: {name}", manifest(change), commands) for name, (change, commands) in MANIFESTS.items()),
    *(Case(f"manifest: {name}", manifest_bytes(data), READERS) for name, data in MANIFEST_BYTES.items()),
    *(Case(f"graph: {name}", graph(change), ("generate prompt", "serve", "verify"))
      for name, change in GRAPHS.items()),
    *(Case(f"graph: {name}", graph_bytes(make), ("generate prompt", "verify"))
      for name, make in GRAPH_BYTES.items()),
    *(Case(f"weights: {name}", weights(change), ("generate int8", "verify int8")) for name, change in NAMES.items()),
    *(Case(f"adapter at run time: {name}", runtime_adapter(make), ("generate separate",))
      for name, make in RUNTIME.items()),
    Case("adapter at run time: other factors", runtime_adapter(other_factors), ("generate separate",), codes=(0, 1, 4)),
    *(Case(f"adapter at run time: {name}", adapter_name(change), ("generate separate",))
      for name, change in ADAPTER_LISTS.items()),
    Case("adapter at run time: not the listed one", runtime_adapter(lambda data: data + b"x", listed=False),
         ("generate separate",)),
    *(Case(f"genai_config: {name}", genai(value), ("verify-manifest", "verify"))
      for name, value in {"a list": [], "another graph": {"model": {"decoder": {"filename": "/evil.onnx"}}}}.items()),
]  # fmt: skip
