"""Values of config.json, their types checked, and options that no graph of ours honours."""

from collections.abc import Mapping
from typing import Any

from exporter.errors import InputRefused

# transformers' ACT2FN names -> the function they compute
ACTIVATIONS = {
    "gelu": "erf",
    "gelu_python": "erf",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu_accurate": "tanh",
    "quick_gelu": "quick",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
# GroupQueryAttention (ONNX Runtime 1.31) takes no other head size
HEAD_SIZE_MULTIPLE = 8


def refuse_other_models(values: Mapping[str, Any]) -> None:
    """InputRefused for what would make any decoder another model: by the option's name."""
    if values.get("quantization_config"):
        raise InputRefused("config.json has a quantization_config", expected="weights in full precision")
    if values.get("add_cross_attention"):
        raise InputRefused("config.json sets add_cross_attention", expected="a decoder without an encoder")
    if values.get("pruned_heads"):
        raise InputRefused("config.json lists pruned_heads", expected="a model with all of its heads")
    if not values.get("is_causal", True):  # transformers 5 lets every token see every other one then
        raise InputRefused("config.json sets is_causal to false", expected="a causal decoder")


def activation(values: Mapping[str, Any], key: str, default: str) -> str:
    """A value of ACTIVATIONS; InputRefused for a function that no node computes."""
    name = values.get(key, default)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise InputRefused(f"{key} {name!r}", expected="one of " + ", ".join(sorted(ACTIVATIONS)))
    return ACTIVATIONS[name]


def require_head_size(width_key: str, width: int, heads_key: str, heads: int) -> None:
    """InputRefused unless GroupQueryAttention takes heads of width / heads."""
    if width % heads or (width // heads) % HEAD_SIZE_MULTIPLE:
        raise InputRefused(
            f"{width_key} {width} over {heads_key} {heads}",
            expected=f"a head size that is a multiple of {HEAD_SIZE_MULTIPLE} (ONNX Runtime's GroupQueryAttention)",
            todo="export with --builder optimum",
        )


def count(values: Mapping[str, Any], key: str, default: int) -> int:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputRefused(f"config.json: {key} is {value!r}", expected="a positive whole number")
    return value


def number(values: Mapping[str, Any], key: str, default: float) -> float:
    """Between 0 and 1, as an epsilon or a share is."""
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise InputRefused(f"config.json: {key} is {value!r}", expected="a number between 0 and 1")
    return float(value)


def flag(values: Mapping[str, Any], key: str, default: bool) -> bool:
    value = values.get(key, default)
    if not isinstance(value, bool):
        raise InputRefused(f"config.json: {key} is {value!r}", expected="true or false")
    return value
