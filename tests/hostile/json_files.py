"""config.json, adapter_config.json, the index: wrong types, absurd numbers, names of files elsewhere, code by name."""

from collections.abc import Callable
from typing import Any

from tests.hostile.case import Case, edited, with_key, without
from tests.hostile.material import Tree
from tests.pairs import as_bin

INDEX = "pytorch_model.bin.index.json"
NAN, INFINITE = float("nan"), float("inf")


def config(change: Callable[[Any], Any]) -> Callable[[Tree], object]:
    return lambda tree: edited(tree.base / "config.json", change)


def merged_config(change: Callable[[Any], Any]) -> Callable[[Tree], object]:
    return lambda tree: edited(tree.merged / "config.json", change)


def adapter(change: Callable[[Any], Any]) -> Callable[[Tree], object]:
    return lambda tree: edited(tree.adapter / "adapter_config.json", change)


def sharded(change: Callable[[Any], Any]) -> Callable[[Tree], object]:
    def damage(tree: Tree) -> None:
        as_bin(tree.base, shards=2)
        edited(tree.base / INDEX, change)

    return damage


def shard_is(name: Any) -> Callable[[Tree], object]:
    """Every tensor in a file of this name, and such a file where a careless join would find it."""

    def damage(tree: Tree) -> None:
        as_bin(tree.base, shards=2)
        (tree.outside / "secret.bin").write_bytes(b"secret")
        wanted = name(tree) if callable(name) else name
        edited(tree.base / INDEX, lambda index: index | {"weight_map": dict.fromkeys(index["weight_map"], wanted)})

    return damage


def index_file(data: bytes) -> Callable[[Tree], object]:
    def damage(tree: Tree) -> None:
        as_bin(tree.base, shards=2)
        (tree.base / INDEX).write_bytes(data)

    return damage


def written(place: str, data: bytes) -> Callable[[Tree], object]:
    return lambda tree: (tree.root / place).write_bytes(data)


JSON = {
    "a list": b"[]",
    "null": b"null",
    "nothing": b"",
    "NaN": b"NaN",
    "bytes": b"\xff\xfe\x00\x01",
    "100000 levels": b"[" * 100_000 + b"]" * 100_000,
    "200 levels under a key": b'{"x": ' + b"[" * 200 + b"]" * 200 + b"}",
    "half a surrogate pair": b'{"\\ud800": 1}',
    "code": b'__import__("os").system("touch outside_ran")',
    "a number of a million digits": b'{"n_layer": ' + b"9" * 10**6 + b"}",
    "65 MB of spaces": b"{}" + b" " * (65 << 20),
}

SIZES = {
    "of a billion": 10**9, "of 10**30": 10**30, "of 10**400": 10**400, "of -1": -1, "of 0": 0, "of true": True,
    "of text": "12", "of a float": 2.5, "of null": None, "of a list": [1], "of NaN": NAN, "of Infinity": INFINITE,
    "of an object": {"x": 1},
}  # fmt: skip
# null is transformers' own word for "as usual"; what num_labels says does not matter to a causal model.
EVERY_KEY = ("n_layer", "n_embd", "n_head", "n_positions", "vocab_size")
CODE = {
    "auto_map": {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Config"},
    "custom_pipelines": {"x": {"impl": "evil.Pipeline"}},
    "trust_remote_code": True,
    "_attn_implementation": "evil/kernel:code",
    "attn_implementation": "evil/kernel:code",
    "_name_or_path": "../../outside",
}
UNUSUAL_CONFIG = {
    "a model type that is a path": ("model_type", "../../outside"),
    "a model type of 100 kB": ("model_type", "x" * 100_000),
    "a model type that is a number": ("model_type", 7),
    "a model type that is a list": ("model_type", ["gpt2"]),
    "architectures that are numbers": ("architectures", [1, 2]),
    "architectures that are an object": ("architectures", {"x": 1}),
    "an activation with code": ("activation_function", "__import__('os').system('touch outside_ran')"),
    "an activation that is a list": ("activation_function", ["gelu"]),
    "a data type with code": ("torch_dtype", "system"),
    "a data type that is a list": ("torch_dtype", ["float16"]),
    "an epsilon of NaN": ("layer_norm_epsilon", NAN),
    "an epsilon of text": ("layer_norm_epsilon", "1e-5"),
    "an end of text that is an object": ("eos_token_id", {"x": 1}),
    "an end of text beyond the vocabulary": ("eos_token_id", 10**12),
    "a quantization that is a payload": ("quantization_config", {"quant_method": "evil", "modules": "os"}),
    "a text config that nests": ("text_config", {"text_config": {"text_config": {"n_layer": 10**9}}}),
    "a million labels": ("num_labels", 10**7),
    "labels that are a list": ("id2label", [1, 2]),
    "pruned heads that are text": ("pruned_heads", "all"),
    "inner of -1": ("n_inner", -1),
    "tied by a number": ("tie_word_embeddings", 1),
}
ADAPTER_VALUES: dict[str, Any] = {
    "r": [0, -1, 10**9, 10**400, True, "4", 4.5, None, [4], {"x": 4}, NAN],
    "lora_alpha": [NAN, INFINITE, -INFINITE, 10**400, "16", True, None, [16], {"x": 1}],
    "peft_type": ["EVIL", 7, None, ["LORA"], {"x": 1}, "../../outside", "__class__", "PROMPT_TUNING"],
    "rank_pattern": [[1], "x", {"(a+)+$": 4}, {"c_attn": "4"}, {"c_attn": -1}, {"c_attn": 10**9}, {"(": 4}],
    "alpha_pattern": [7, {"c_attn": NAN}, {"c_attn": "16"}, {"c_attn": 10**400}, {"(.*)*x": 16}],
    "target_modules": ["(a+)+$", "a?" * 30 + "a" * 30, "(" * 5000, 10**9, {"x": 1}],
    "modules_to_save": ["lm_head", [1], {"x": 1}, ["../../outside"], [None]],
    "target_parameters": ["x", [1], ["mlp.experts.gate"]],
    "use_rslora": ["true", 1, "__import__('os')"],
    "use_dora": ["yes", 1],
    "bias": ["some", 7, ["none"]],
    "layer_replication": [[[0, 10**9]], "x"],
    "megatron_config": [{"x": 1}],
    "init_lora_weights": ["pissa", ["gaussian"], {"x": 1}],
    "trainable_token_indices": ["x", [-1], [10**9], {"wte": [10**12]}, [1.5]],
    "corda_config": [],
    "exclude_modules": ["(.*)*x"],
    "evil_field": [True, "x"],
}


def _adapter_cases() -> list[Case]:
    cases = []
    for key, values in ADAPTER_VALUES.items():
        for number, value in enumerate(values):
            shown = str(value)[:24]
            cases.append(
                Case(f"adapter config: {key} {number} {shown!a}", adapter(with_key(key, value=value)), ("inspect",))
            )
    return cases


def outside_file(tree: Tree) -> str:
    return str(tree.outside / "secret.bin")


def relative(tree: Tree) -> str:
    return "../../" + tree.outside.name + "/secret.bin"


SHARDS: dict[str, Any] = {
    "an absolute path": outside_file,
    "a path upwards": relative,
    "/dev/zero": "/dev/zero",
    "/proc/self/mem": "/proc/self/mem",
    "..": "..",
    ".": ".",
    "no name": "",
    "a directory's name": "sub/x.bin",
    "a backslash": "..\\secret.bin",
    "a zero byte": "x\0.bin",
    "a name of 5000 letters": "x" * 5000,
    "half a surrogate pair": "\ud800.bin",
    "a URL": "https://example.invalid/x.bin",
    "a number": 7,
    "null": None,
    "a list": ["a.bin"],
    "a file that is not there": "pytorch_model-00009-of-00009.bin",
    "the configuration": "config.json",
    "itself": INDEX,
}
INDEXES: dict[str, Callable[[Any], Any]] = {
    "no weight_map": without("weight_map"),
    "an empty weight_map": with_key("weight_map", value={}),
    "a weight_map that is a list": with_key("weight_map", value=[1]),
    "a weight_map that is text": with_key("weight_map", value="x.bin"),
    "a weight_map that is null": with_key("weight_map", value=None),
    "a tensor that is nowhere": lambda i: i["weight_map"].update(ghost=next(iter(i["weight_map"].values()))),
    "two shards exchanged": lambda i: i.update(
        weight_map={k: v.replace("00001-of", "x").replace("00002-of", "00001-of").replace("x", "00002-of")
                    for k, v in i["weight_map"].items()}
    ),
    "20000 shards": lambda i: i.update(weight_map={f"t{n}": f"{n}.bin" for n in range(20_000)}),
}  # fmt: skip
CASES = [
    *(
        Case(f"{place}: {name}", written(place, data), commands)
        for place, commands in (
            ("base/config.json", ("inspect", "merge", "export", "capture")),
            ("adapter/adapter_config.json", ("inspect", "merge", "export separate", "verify")),
        )
        for name, data in JSON.items()
    ),
    *(
        Case(f"config: {key} {name}", config(with_key(key, value=value)), ("inspect", "merge", "export"), codes=(0, 4))
        for key in EVERY_KEY
        for name, value in SIZES.items()
    ),
    *(
        Case(f"config: {key} {name}, behind the bundle's back", merged_config(with_key(key, value=value)),
             ("generate prompt",))
        for key in EVERY_KEY if key != "n_head"
        for name, value in SIZES.items()
    ),
    *(
        Case(f"config: {name}", config(with_key(key, value=value)),
             ("inspect", "merge", "export", "export separate", "export int8-exact"), codes=(0, 4))
        for name, (key, value) in UNUSUAL_CONFIG.items()
    ),
    *(
        Case(f"code by name: {key} in config.json", config(with_key(key, value=value)),
             ("inspect", "merge", "export", "export separate"), codes=(0, 4))
        for key, value in CODE.items()
    ),
    *_adapter_cases(),
    *(Case(f"index: {name}", shard_is(shard), ("inspect", "export")) for name, shard in SHARDS.items()),
    *(Case(f"index: {name}", sharded(change), ("inspect", "merge")) for name, change in INDEXES.items()),
    *(
        Case(f"index file: {name}", index_file(data), ("inspect",))
        for name, data in JSON.items()
    ),
]  # fmt: skip
