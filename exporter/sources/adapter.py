"""A PEFT adapter directory, typed: its configuration, every field handled or refused by name, and its tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import InputRefused
from exporter.sources.checkpoint import read_headers, read_json
from exporter.sources.own_files import require_own_files
from exporter.sources.patterns import check_patterns
from exporter.sources.tensors import TensorInfo

CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")
WRAPPER = "base_model.model."

# Fields that say nothing about the merged weights: bookkeeping, training, and how a rank was initialised.
IRRELEVANT = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_version",
        "lora_dropout", "layers_pattern", "megatron_core", "runtime_config", "merge_weights", "exclude_modules",
        "layers_to_transform", "eva_config", "corda_config", "loftq_config", "lora_ga_config", "ensure_weight_tying",
        "fan_in_fan_out", "qalora_group_size",
    }
)  # fmt: skip
HANDLED = frozenset(
    {
        "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "use_dora", "lora_bias",
        "modules_to_save", "target_modules", "target_parameters", "trainable_token_indices",
    }
)  # fmt: skip
# Fields of a LoRA that change the weights in ways no merge can follow, with the values that leave them alone.
NEUTRAL: dict[str, tuple[object, ...]] = {
    # PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA also replace the base's weights; PEFT converts such adapters when it saves
    # them with path_initial_model_for_weight_conversion.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "layer_replication": (None, []),
    "enable_lora": (None,),  # MergedLinear of peft 0.1 and 0.2
    "megatron_config": (None,),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "use_bdlora": (False, None),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "kasa_config": (None,),
}
LORA, TRAINABLE_TOKENS = "LORA", "TRAINABLE_TOKENS"


@dataclass(frozen=True, slots=True)
class Adapter:
    """`method` is PEFT's peft_type. `tensors` by name without PEFT's wrapper prefix, otherwise as the file has them."""

    directory: Path
    config: Mapping[str, Any]
    method: str
    file: Path
    tensors: Mapping[str, TensorInfo]


def open_adapter(directory: Path) -> Adapter:
    """Read the configuration and the header; InputRefused names what is missing, unknown or malformed."""
    if not directory.is_dir():
        raise InputRefused(f"{directory} is not a directory", expected="a PEFT adapter directory")
    require_own_files(directory)
    config = read_json(directory / CONFIG)
    method = config.get("peft_type")
    if not isinstance(method, str):
        raise InputRefused(f"{directory / CONFIG} has peft_type {method!r}", expected="a method such as LORA")
    check_patterns(config, directory / CONFIG)
    if method == LORA:
        check_lora_config(config, directory / CONFIG)
    files = [directory / name for name in FILES if (directory / name).is_file()]
    if not files:
        raise InputRefused(f"no adapter weights in {directory}", expected=" or ".join(FILES), todo="check the path")
    return Adapter(directory, config, method, files[0], _strip_wrapper(read_headers(files[0]), files[0]))


def check_lora_config(config: Mapping[str, Any], path: Path) -> None:
    """Refuse by name every field of a LoRA that a merge would have to ignore, and every malformed value."""
    for key, neutral in NEUTRAL.items():
        if key in config and config[key] not in neutral:
            raise InputRefused(
                f"{path} sets {key} to {str(config[key])[:80]!r}",
                expected=f"{key} unset: what it does to the weights cannot be merged",
                todo="train or convert the adapter without it",
            )
    unknown = sorted(set(config) - IRRELEVANT - HANDLED - set(NEUTRAL))
    if unknown := [key for key in unknown if config[key]]:
        raise InputRefused(
            f"{path} sets fields this version does not know: {', '.join(unknown)}",
            expected="fields of peft 0.1 to 0.21",
            todo="update exporter, or remove the fields if they do not change the weights",
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank < 1e9:
        raise InputRefused(f"{path} has r {str(rank)[:80]}", expected="a rank of 1 or more")
    if not _is_finite_number(alpha):
        raise InputRefused(f"{path} has lora_alpha {str(alpha)[:80]!r}", expected="a finite number")
    _check_shapes_of_values(config, path)


def _check_shapes_of_values(config: Mapping[str, Any], path: Path) -> None:
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise InputRefused(f"{path} has {key} {config[key]!r}", expected="a map from module names to numbers")
    for key in ("use_rslora", "use_dora", "lora_bias"):
        if not isinstance(config.get(key) or False, bool):
            raise InputRefused(f"{path} has {key} {config[key]!r}", expected="true or false")
    for key in ("modules_to_save", "target_parameters"):
        value = config.get(key) or []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise InputRefused(f"{path} has {key} {str(value)[:80]!r}", expected="a list of names")
    targets = config.get("target_modules") or []
    if not isinstance(targets, str | list) or not all(isinstance(name, str) for name in targets):
        raise InputRefused(f"{path} has target_modules {str(targets)[:80]!r}", expected="names or a pattern")
    if config.get("bias") not in (None, "none", "all", "lora_only"):
        raise InputRefused(f"{path} has bias {config['bias']!r}", expected="none, all or lora_only")


def _is_finite_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e9 < value < 1e9


def _strip_wrapper(tensors: Mapping[str, TensorInfo], file: Path) -> dict[str, TensorInfo]:
    """`base_model.model.` is PEFT's wrapper; it stands twice where a PeftModel was wrapped again.

    Tensors that a method shares among modules hang on the tuner itself, and keep their `base_model.` (`.vera_A`).
    """
    stripped: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        short = name
        while short.startswith(WRAPPER):
            short = short.removeprefix(WRAPPER)
        if short in stripped:
            raise InputRefused(f"{file.name} holds {short!r} twice", expected="each tensor once")
        stripped[short] = info
    if not stripped:
        raise InputRefused(
            f"{file.name} holds no tensors", expected="adapter weights", todo="check what was trained and saved"
        )
    return stripped
