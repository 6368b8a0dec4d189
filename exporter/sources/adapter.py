"""A PEFT adapter directory, typed: its configuration, every field handled or refused, and its tensors by module."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import InputRefused
from exporter.sources.checkpoint import read_headers, read_json
from exporter.sources.tensors import FLOATS, TensorInfo

CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")

# Fields that say nothing about the merged weights: bookkeeping, training, and how a rank was initialised.
IRRELEVANT = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_version",
        "peft_type", "lora_dropout", "modules_to_save", "layers_pattern", "megatron_core", "runtime_config",
        "merge_weights", "exclude_modules", "target_modules", "layers_to_transform", "eva_config", "corda_config",
        "loftq_config", "lora_ga_config", "ensure_weight_tying", "fan_in_fan_out",
    }
)  # fmt: skip
HANDLED = frozenset({"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"})
# Fields that change the weights in ways this version does not merge, with the value that leaves them alone.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "bias": ("none", None),
    # PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA also replace the base's weights
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "layer_replication": (None, []),
    "enable_lora": (None,),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "megatron_config": (None,),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "qalora_group_size": (16, None),
    "use_bdlora": (False, None),
}
TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """The low-rank pair of one module. down is PEFT's A (r, in), up is PEFT's B (out, r); scale multiplies B A."""

    module: str
    down: TensorInfo
    up: TensorInfo
    rank: int
    scale: float


@dataclass(frozen=True, slots=True)
class Adapter:
    """`factors` by module name, as the adapter writes it after `base_model.model.`."""

    directory: Path
    config: dict[str, Any]
    file: Path
    factors: Mapping[str, LoraFactors]

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return {info.name: info for pair in self.factors.values() for info in (pair.down, pair.up)}


def open_adapter(directory: Path) -> Adapter:
    """Read the configuration and the header; InputRefused names what is missing, unknown or not mergeable."""
    if not directory.is_dir():
        raise InputRefused(f"{directory} is not a directory", expected="a PEFT adapter directory")
    config = read_json(directory / CONFIG)
    check_config(config, directory / CONFIG)
    files = [directory / name for name in FILES if (directory / name).is_file()]
    if not files:
        raise InputRefused(f"no adapter weights in {directory}", expected=" or ".join(FILES), todo="check the path")
    tensors = read_headers(files[0])
    return Adapter(directory, config, files[0], _factors(tensors, config, files[0]))


def check_config(config: dict[str, Any], path: Path) -> None:
    """Refuse by name every field that this merge would have to ignore."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputRefused(
            f"{path} has peft_type {kind!r}",
            expected="LORA",
            todo="merge it with PEFT itself: model.merge_and_unload()",
        )
    for key, neutral in NEUTRAL.items():
        if key in config and config[key] not in neutral:
            raise InputRefused(
                f"{path} sets {key} to {str(config[key])[:80]!r}",
                expected=f"{key} unset: this version merges plain LoRA",
                todo="merge this adapter with PEFT itself: model.merge_and_unload()",
            )
    if config.get("modules_to_save"):
        raise InputRefused(
            f"{path} sets modules_to_save to {config['modules_to_save']!r}",
            expected="an adapter of LoRA factors only",
            todo="merge this adapter with PEFT itself: model.merge_and_unload()",
        )
    unknown = sorted(set(config) - IRRELEVANT - HANDLED - set(NEUTRAL))
    if unknown := [key for key in unknown if config[key]]:
        raise InputRefused(
            f"{path} sets fields this version does not know: {', '.join(unknown)}",
            expected="fields of peft 0.1 to 0.21",
            todo="update exporter, or remove the fields if they do not change the weights",
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise InputRefused(f"{path} has r {rank!r}", expected="a rank of 1 or more")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) < 1e9:
        raise InputRefused(f"{path} has lora_alpha {alpha!r}", expected="a finite number")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise InputRefused(f"{path} has {key} {config[key]!r}", expected="a map from module names to numbers")


def _module_name(name: str) -> str:
    """`base_model.model.` is PEFT's wrapper; it stands twice where a PeftModel was wrapped again."""
    while name.startswith("base_model.model."):
        name = name.removeprefix("base_model.model.")
    return name.replace(".base_layer", "")


def _factors(tensors: Mapping[str, TensorInfo], config: dict[str, Any], file: Path) -> dict[str, LoraFactors]:
    pairs: dict[str, dict[str, TensorInfo]] = {}
    names = set()
    for name, info in tensors.items():
        match = TENSOR.fullmatch(name)
        if match is None:
            raise InputRefused(
                f"{file.name} holds {name!r}",
                expected="tensors named <module>.lora_A.weight and <module>.lora_B.weight",
                todo="merge this adapter with PEFT itself: model.merge_and_unload()",
            )
        names.add(match["adapter"])
        if info.dtype not in FLOATS or len(info.shape) != 2:
            raise InputRefused(f"{name!r} is {info.dtype} {list(info.shape)}", expected="a matrix of floats")
        pairs.setdefault(_module_name(match["module"]), {})[match["factor"]] = info
    if len(names) > 1:
        raise InputRefused(f"{file.name} holds several adapters: {sorted(map(str, names))}", expected="one")
    if not pairs:
        raise InputRefused(
            f"{file.name} holds no tensors", expected="LoRA factors", todo="check what was trained and saved"
        )
    return {module: _pair(module, pair, config) for module, pair in sorted(pairs.items())}


def _pair(module: str, pair: dict[str, TensorInfo], config: dict[str, Any]) -> LoraFactors:
    for factor, other in (("A", "B"), ("B", "A")):
        if factor not in pair:
            raise InputRefused(
                f"{module} has lora_{other} and no lora_{factor}", expected="both factors of every module"
            )
    down, up = pair["A"], pair["B"]
    rank = _pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    if down.shape[0] != rank or up.shape[1] != rank:
        raise InputRefused(
            f"{module} has factors of shape {list(down.shape)} and {list(up.shape)}",
            expected=f"rank {rank}, as {CONFIG} says",
            todo="check that weights and configuration belong together",
        )
    # Hu et al., LoRA (2021): alpha/r. Kalajdzievski, rsLoRA (2023): alpha/sqrt(r).
    scale = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
    return LoraFactors(module, down, up, int(rank), float(scale))


def _pattern(pattern: dict[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's get_pattern_key: the first key that equals the module's name or its end after a dot, as a regex."""
    for key, value in (pattern or {}).items():
        try:
            matched = re.match(rf"(.*\.)?({key})$", module)
        except re.error as error:
            raise InputRefused(f"the pattern {key!r} is not a regular expression ({error})") from error
        if matched:
            if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
                raise InputRefused(f"the pattern {key!r} has the value {value!r}", expected="a positive number")
            return value
    return default
