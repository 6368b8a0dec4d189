"""What one adapter does to one stored tensor: frozen values that a plan holds and `delta` computes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from exporter.sources.tensors import TensorInfo

# How a two-dimensional weight is stored: "out_in" as Linear does, "in_out" as Conv1D and Embedding do.
Orientation = Literal["in_out", "out_in"]


@dataclass(frozen=True, slots=True)
class StackPart:
    """A stored matrix `name` that is rows `start` to `stop` of the matrix of one expert in a stack."""

    name: str
    expert: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class LowRank:
    """Adds scale * B A (LoRA). down is A (r, in), up is B (out, r); `scale` includes the adapter's weight.

    experts > 1: a stack of matrices with A (experts * r, in) and B (out, r * experts), PEFT's `target_parameters`.
    part: the tensor is stored apart, and is this part of the stack.
    """

    module: str
    down: TensorInfo
    up: TensorInfo
    rank: int
    scale: float
    orientation: Orientation
    experts: int = 1
    part: StackPart | None = None


@dataclass(frozen=True, slots=True)
class WeightDecomposed:
    """m * V / ||V|| with V = W + scale * B A (DoRA); the norm is taken over each output's inputs.

    magnitude is m: (out,), and for an embedding (1, d), one for each column.
    """

    low_rank: LowRank
    magnitude: TensorInfo


@dataclass(frozen=True, slots=True)
class AddVector:
    """Adds scale * vector to a bias: the bias of B that `lora_bias` trains."""

    module: str
    vector: TensorInfo
    scale: float


@dataclass(frozen=True, slots=True)
class ReplaceRows:
    """Puts other values into the rows of some tokens (`trainable_token_indices`). values (len(rows), d).

    is_shared: of an input embedding and of everything that is tied to it.
    """

    module: str
    values: TensorInfo
    rows: tuple[int, ...]
    is_shared: bool = False


@dataclass(frozen=True, slots=True)
class PeftLayer:
    """What PEFT's own layer of a method makes of one module, in float32. `parameter`: "weight" or "bias".

    tensors: the adapter's tensors of this module and those that the method shares among modules, by name.
    parameters: the base's tensors of the module, by parameter.
    """

    module: str
    parameter: str
    method: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    parameters: Mapping[str, TensorInfo]


@dataclass(frozen=True, slots=True)
class OntoInt8:
    """Replaces a weight by what its bitsandbytes int8 codes mean: the base that the adapter was trained on."""

    orientation: Orientation


Change = LowRank | WeightDecomposed | AddVector | ReplaceRows | PeftLayer
