"""What the user hands over beside models: specs, prompts, captured references."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from tests.hostile.case import Case
from tests.hostile.material import SPEC, Tree

SPECS: dict[str, str | bytes] = {
    "nothing": "",
    "no TOML": "[base",
    "bytes": b"\xff\xfe\x00",
    "a zero byte": SPEC + "\0",
    "100000 levels": "x = " + "[" * 100_000,
    "dotted keys 5000 deep": ".".join("a" * 5000) + " = 1",
    "an unknown table": SPEC + "[code]\nrun = 'os.system'\n",
    "an unknown key": SPEC.replace('source = "base"', 'source = "base"\nexec = "x"'),
    "a source that is a number": SPEC.replace('"base"', "7"),
    "a source with a zero byte": SPEC.replace('"base"', '"ba\\u0000se"'),
    "a source of 100 kB": SPEC.replace('"base"', '"' + "x" * 100_000 + '"'),
    "a source that is nowhere": SPEC.replace('"base"', '"./nowhere"'),
    "a weight of text": SPEC.replace('source = "adapter"', 'source = "adapter"\nweight = "big"'),
    "a weight of NaN": SPEC.replace('source = "adapter"', 'source = "adapter"\nweight = nan'),
    "a weight of infinity": SPEC.replace('source = "adapter"', 'source = "adapter"\nweight = inf'),
    "a shard of -1": SPEC + "[merge]\nshard_size = -1\n",
    "a shard of nothing": SPEC + "[merge]\nshard_size = 0\n",
    "a shard of 1e400": SPEC + "[merge]\nshard_size = '1e400GB'\n",
    "a shard of words": SPEC + "[merge]\nshard_size = 'much'\n",
    "a memory of nothing": SPEC + "[merge]\nmemory = 0\n",
    "a data type of its own": SPEC + "[merge]\ndtype = 'float3'\n",
    "an unknown precision": SPEC + "[export]\nprecisions = ['int3']\n",
    "no precision": SPEC + "[export]\nprecisions = []\n",
    "a precision that is a path": SPEC + "[export]\nprecisions = ['../../outside']\n",
    "an unknown level": SPEC + "[verify]\nlevel = 'never'\n",
    "no adapters": '[base]\nsource = "base"\n[output]\ndir = "out"\n',
    "adapters that are numbers": 'adapter = [1]\n[base]\nsource = "base"\n[output]\ndir = "out"\n',
    "a template that is a list": SPEC.replace('"alpaca"', "[1]"),
    "a template of no name": SPEC.replace('"alpaca"', '"evil"'),
    "an output that is a file": SPEC.replace('"out"', '"spec.toml"'),
    "an output that is the base": SPEC.replace('"out"', '"base"'),
    "an output with a zero byte": SPEC.replace('"out"', '"o\\u0000ut"'),
    "an output that is a number": SPEC.replace('"out"', "7"),
    "a date in place of a text": SPEC.replace('"base"', "1979-05-27"),
}
PROMPTS: dict[str, bytes] = {
    "nothing": b"",
    "blank lines": b"\n\n \n",
    "no JSON": b"instruction: x\n",
    "a list": b"[1]\n",
    "null": b"null\n",
    "a number": b"7\n",
    "bytes": b'{"text": "\xff"}\n',
    "UTF-16": '{"text": "x"}'.encode("utf-16"),
    "numbers": b'{"instruction": 7, "output": 8}\n',
    "null in a row": b'{"instruction": null}\n',
    "a list in a row": b'{"instruction": ["x"], "output": "y"}\n',
    "both kinds": b'{"text": "x", "instruction": "y"}\n',
    "an empty row": b"{}\n",
    "half a surrogate pair": b'{"text": "\\ud800"}\n',
    "100000 levels": b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
    "200 levels": b'{"text": ' + b"[" * 200 + b"]" * 200 + b"}\n",
    "a number of a million digits": b'{"text": ' + b"9" * 10**6 + b"}\n",
    "NaN": b'{"text": NaN}\n',
    "a name twice": b'{"text": "x", "text": 1}\n',
}


def spec(text: str | bytes) -> Callable[[Tree], object]:
    data = text if isinstance(text, bytes) else text.encode()
    return lambda tree: (tree.root / "spec.toml").write_bytes(data)


def prompts(data: bytes) -> Callable[[Tree], object]:
    return lambda tree: (tree.root / "prompts.jsonl").write_bytes(data)


Change = Callable[[dict[str, np.ndarray], dict[str, str]], Any]


def reference(change: Change) -> Callable[[Tree], object]:
    """The captured file with other tensors or facts, and a header that is in order."""

    def damage(tree: Tree) -> None:
        path = tree.root / "reference"
        with safe_open(path, "np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            metadata = dict(file.metadata())
        change(tensors, metadata)
        save_file(tensors, path, metadata)

    return damage


def tensor(name: str, make: Callable[[np.ndarray], np.ndarray]) -> Change:
    return lambda tensors, _: tensors.update({name: np.ascontiguousarray(make(tensors[name]))})


def fact(key: str, value: str) -> Change:
    return lambda _, metadata: metadata.update({key: value})


def facts(**changes: Any) -> Change:
    values = {"base_files": {}, "adapter_files": {}, "vocabulary": 1, "environment": {}} | changes
    return fact("facts", json.dumps(values))


REFERENCES: dict[str, Change] = {
    "ids beyond the vocabulary": tensor("ids", lambda ids: ids + 10**6),
    "ids below zero": tensor("ids", lambda ids: ids - 10**6),
    "ids of floats": tensor("ids", lambda ids: ids.astype(np.float32)),
    "ids in two dimensions": tensor("ids", lambda ids: ids.reshape(1, -1)),
    "probabilities of NaN": tensor("log_p", lambda log_p: log_p * np.float32("nan")),
    "probabilities of integers": tensor("log_p", lambda log_p: log_p.astype(np.int32)),
    "probabilities above one": tensor("log_p", lambda log_p: log_p + 100),
    "too few probabilities": tensor("log_p", lambda log_p: log_p[:-1]),
    "counts below zero": tensor("counts", lambda counts: np.concatenate([counts[:-1], counts[-1:] * 0 - 1])),
    "counts that do not add up": tensor("counts", lambda counts: counts + 1),
    "counts of 2**30": tensor("counts", lambda counts: counts * 0 + (1 << 30)),
    "a tail of NaN": tensor("tail", lambda tail: tail * np.float32("nan")),
    "a tail that is short": tensor("tail", lambda tail: tail[:-1]),
    "no tail": lambda tensors, _: tensors.pop("tail"),
    "another format": fact("format", "2"),
    "facts that are no JSON": fact("facts", "x"),
    "facts that are a list": fact("facts", "[]"),
    "facts that nest": fact("facts", "[" * 100_000),
    "files that are a list": facts(base_files=[]),
    "files that are numbers": facts(base_files={"a": 1}),
    "a vocabulary of text": facts(vocabulary="x"),
    "other tokens": fact("tokens_sha256", "0" * 64),
    "no facts": lambda _, metadata: metadata.pop("facts"),
}  # fmt: skip
CASES = [
    *(Case(f"spec: {name}", spec(text), ("run",), codes=(2, 4)) for name, text in SPECS.items()),
    *(Case(f"prompts: {name}", prompts(data), ("capture", "verify")) for name, data in PROMPTS.items()),
    *(Case(f"reference: {name}", reference(change), ("verify reference",)) for name, change in REFERENCES.items()),
]
