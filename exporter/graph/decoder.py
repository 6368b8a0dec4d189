"""A decoder as everything beside its own file needs to know it: sizes, parameters, and how its graph is built."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import onnx_ir as ir

from exporter.errors import InputRefused
from exporter.graph.components import Components
from exporter.graph.weights import Weight

# A table's rows are gathered; a head ends the graph; a matrix is a block's, stored (in, out) by Conv1D and (out, in)
# by nn.Linear; a vector is everything else.
Kind = Literal["tokens", "positions", "head", "conv1d", "linear", "vector"]
MATRICES = ("conv1d", "linear")


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a runtime has to know of a decoder."""

    vocab_size: int
    n_positions: int
    hidden_size: int
    n_layer: int
    n_head: int
    head_size: int


@dataclass(frozen=True, slots=True)
class Parameter:
    kind: Kind
    shape: tuple[int, ...]

    @property
    def inputs_outputs(self) -> tuple[int, int]:
        """Of a matrix or a head, y = x W + b."""
        first, second = self.shape
        return (first, second) if self.kind == "conv1d" else (second, first)


@dataclass(frozen=True, slots=True)
class Decoder:
    """A model of one architecture, as its config.json describes it.

    model_class: transformers' name. prefix: of the checkpoint's names, but for the head's. parameters: by name without
    prefix, in the model's order. head: the module that makes logits, whose weight is not stored where it is tied to
    the token embedding. renamed: other names that a checkpoint may give a parameter. ignored: ends of the names of
    buffers that old checkpoints carry. build: the graph over weights by name without prefix.
    """

    model_class: str
    sizes: Sizes
    prefix: str
    parameters: Mapping[str, Parameter]
    head: str
    tied: bool
    build: Callable[[Components], ir.Graph]
    renamed: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def short(self, name: str) -> str:
        """A checkpoint's name of a tensor as `parameters` has it."""
        bare = name.removeprefix(self.prefix)
        return self.renamed.get(bare, bare)

    @property
    def adaptable(self) -> dict[str, Parameter]:
        """Modules that a LoRA can stand beside, by name: the blocks' matrices, and the head, tied or not."""
        found = {name: one for name, one in self.parameters.items() if one.kind in (*MATRICES, "head")}
        found[f"{self.head}.weight"] = Parameter("head", (self.sizes.vocab_size, self.sizes.hidden_size))
        return {name.removesuffix(".weight"): one for name, one in found.items()}


@dataclass(frozen=True, slots=True)
class Architecture:
    """One line of the registry. `read` checks a config.json, and refuses by name what the graph cannot honour.

    default_stop: transformers' default of eos_token_id, for configurations that leave it out.
    """

    model_type: str
    title: str
    default_stop: int
    read: Callable[[Mapping[str, Any]], Decoder]


def decoder_weights(decoder: Decoder, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """The decoder's parameters by name without prefix, shapes checked. InputRefused for one missing or unknown."""
    found = {decoder.short(name): weight for name, weight in weights.items() if not name.endswith(decoder.ignored)}
    if decoder.tied:
        found.pop(f"{decoder.head}.weight", None)  # transformers ties it to the embedding whatever the file holds
    for name, parameter in decoder.parameters.items():
        if name not in found:
            raise InputRefused(
                f"the tensor {name!r} is missing", expected=f"shape {parameter.shape}, as config.json says"
            )
        if found[name].shape != parameter.shape:
            raise InputRefused(
                f"{name!r} has shape {found[name].shape}",
                expected=f"{parameter.shape}, as config.json says",
                todo="check that config.json and the weights belong together",
            )
    unknown = sorted(found.keys() - decoder.parameters.keys())
    if unknown:
        raise InputRefused(
            f"{len(unknown)} tensor(s) that {decoder.model_class} does not have, such as {unknown[0]!r}",
            expected=f"the parameters of {decoder.model_class} and no more",
        )
    return {name: found[name] for name in decoder.parameters}
