"""What of a GPT-2 configuration changes the computation, checked: honoured here or refused by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exporter.errors import InputRefused

# transformers' GPT2Config.attribute_map: either spelling may stand in config.json
ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
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


@dataclass(frozen=True, slots=True)
class Gpt2Config:
    """A GPT-2 decoder with language-model head; names as in transformers' GPT2Config, `n_inner` resolved."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int
    activation: str  # a value of ACTIVATIONS
    layer_norm_epsilon: float
    scale_attn_weights: bool
    scale_attn_by_inverse_layer_idx: bool
    reorder_and_upcast_attn: bool
    tied: bool

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    def attention_scale(self, layer: int) -> float:
        """What q.k is multiplied by before the softmax (transformers' GPT2Attention)."""
        scale = self.head_size**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale


def read_gpt2_config(config: Mapping[str, Any]) -> Gpt2Config:
    """Types of the JSON values are checked; InputRefused names the option that cannot be honoured."""
    values = {ALIASES.get(key, key): value for key, value in config.items()}
    if values.get("model_type") != "gpt2":
        raise InputRefused(f"model_type {values.get('model_type')!r}", expected="gpt2 (GPT-2, Cerebras-GPT)")
    if values.get("quantization_config"):
        raise InputRefused("config.json has a quantization_config", expected="weights in full precision")
    if values.get("add_cross_attention"):
        raise InputRefused("config.json sets add_cross_attention", expected="a decoder without an encoder")
    if values.get("pruned_heads"):
        raise InputRefused("config.json lists pruned_heads", expected="a model with all of its heads")
    name = values.get("activation_function", "gelu_new")
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise InputRefused(f"activation_function {name!r}", expected="one of " + ", ".join(sorted(ACTIVATIONS)))
    n_embd = _count(values, "n_embd", 768)
    n_inner = 4 * n_embd if values.get("n_inner") is None else _count(values, "n_inner", 0)
    parsed = Gpt2Config(
        vocab_size=_count(values, "vocab_size", 50257),
        n_positions=_count(values, "n_positions", 1024),
        n_embd=n_embd,
        n_layer=_count(values, "n_layer", 12),
        n_head=_count(values, "n_head", 12),
        n_inner=n_inner,
        activation=ACTIVATIONS[name],
        layer_norm_epsilon=_number(values, "layer_norm_epsilon", 1e-5),
        scale_attn_weights=_flag(values, "scale_attn_weights", True),
        scale_attn_by_inverse_layer_idx=_flag(values, "scale_attn_by_inverse_layer_idx", False),
        reorder_and_upcast_attn=_flag(values, "reorder_and_upcast_attn", False),
        tied=_flag(values, "tie_word_embeddings", True),
    )
    if parsed.n_embd % parsed.n_head or parsed.head_size % HEAD_SIZE_MULTIPLE:
        raise InputRefused(
            f"n_embd {parsed.n_embd} over n_head {parsed.n_head}",
            expected=f"a head size that is a multiple of {HEAD_SIZE_MULTIPLE} (ONNX Runtime's GroupQueryAttention)",
            todo="export with --builder optimum",
        )
    return parsed


def _count(values: Mapping[str, Any], key: str, default: int) -> int:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputRefused(f"config.json: {key} is {value!r}", expected="a positive whole number")
    return value


def _number(values: Mapping[str, Any], key: str, default: float) -> float:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise InputRefused(f"config.json: {key} is {value!r}", expected="a number between 0 and 1")
    return float(value)


def _flag(values: Mapping[str, Any], key: str, default: bool) -> bool:
    value = values.get(key, default)
    if not isinstance(value, bool):
        raise InputRefused(f"config.json: {key} is {value!r}", expected="true or false")
    return value
