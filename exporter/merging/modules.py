"""What a checkpoint's tensors are, by the model's own classes: the model is built on the meta device, without weights.

Orientation comes from a module's class and never from `fan_in_fan_out` or a shape: an 8-bit base makes PEFT write
`fan_in_fan_out: false` for a Conv1D, and a square matrix fits both ways.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.pytorch_utils import Conv1D

from exporter.errors import InputRefused
from exporter.merging.changes import Orientation, StackPart

# Buffers that old checkpoints carry and current model classes compute.
OLD_BUFFERS = re.compile(r"(.*\.)?((attn|attention)\.(bias|masked_bias)|rotary_emb\.inv_freq|embeddings\.position_ids)")
CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


@dataclass(frozen=True, slots=True)
class ModuleInfo:
    """orientation: of a weight that LoRA's B A is added to as a matrix, else None. parameters: its own, in order.

    is_transposed: a stack of experts that says it is (experts, in, out); PEFT takes others as (experts, out, in).
    """

    orientation: Orientation | None
    parameters: tuple[str, ...]
    is_convolution: bool
    is_transposed: bool


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """state: shape by name in state-dict order, tied names left out. tied: alias -> the name that is stored.

    input_embedding, output_embedding: names of their modules. model: the architecture on the meta device.
    renamed: from the model's name of a tensor to the checkpoint's, where they differ. stacks: the model's name of a
    stack of matrices to the checkpoint's tensors that loading makes it of.
    """

    state: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str]
    modules: Mapping[str, ModuleInfo]
    prefix: str
    input_embedding: str | None
    output_embedding: str | None
    model: transformers.PreTrainedModel
    renamed: Mapping[str, str] = field(default_factory=dict)
    stacks: Mapping[str, tuple[StackPart, ...]] = field(default_factory=dict)

    def stored(self, name: str) -> str:
        """The name in the checkpoint's files of a tensor that the installed transformers may call otherwise."""
        return self.renamed.get(name, name)

    @property
    def matrices(self) -> dict[str, Orientation]:
        """Modules that LoRA adapts as matrices."""
        return {name: info.orientation for name, info in self.modules.items() if info.orientation}


def model_layout(directory: Path, config: Mapping[str, Any], *, untied: bool = False) -> ModelLayout:
    """Build the architecture that `config.json` names on the meta device. InputRefused where transformers has none.

    untied: as if `tie_word_embeddings` were false.
    """
    model = _empty_model(directory, config, untied)
    state: dict[str, tuple[int, ...]] = {}
    tied: dict[str, str] = {}
    stored: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in stored:
            tied[name] = stored[id(tensor)]
        else:
            stored[id(tensor)] = name
            state[name] = tuple(tensor.shape)
    names = {id(module): name for name, module in model.named_modules()}
    return ModelLayout(
        state,
        tied,
        {name: _module_info(module) for name, module in model.named_modules() if name},
        model.base_model_prefix,
        names.get(id(_embeddings(model.get_input_embeddings))),
        names.get(id(_embeddings(model.get_output_embeddings))),
        model,
    )


def _embeddings(getter: Any) -> object:
    """transformers raises NotImplementedError for a model that has no such embeddings."""
    try:
        return getter()
    except (NotImplementedError, AttributeError):
        return None


def _module_info(module: torch.nn.Module) -> ModuleInfo:
    orientation: Orientation | None = None
    if isinstance(module, Conv1D | torch.nn.Embedding):
        orientation = "in_out"
    elif isinstance(module, torch.nn.Linear):
        orientation = "out_in"
    return ModuleInfo(
        orientation,
        tuple(name for name, _ in module.named_parameters(recurse=False)),
        isinstance(module, CONVOLUTIONS),
        bool(getattr(module, "is_transposed", False)),
    )


# What transformers raises for a config.json that it cannot make a model of.
BUILD_ERRORS = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    OSError,
    RuntimeError,
    ImportError,
    ArithmeticError,
    AssertionError,
)


def _empty_model(directory: Path, config: Mapping[str, Any], untied: bool) -> transformers.PreTrainedModel:
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputRefused(f"{directory}/config.json has architectures {names!r}", expected="a list of class names")
    try:
        parsed = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        if untied:
            parsed.tie_word_embeddings = False
        found = getattr(transformers, names[0], None) if names else None
        with torch.device("meta"), _quiet():
            if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
                return found(parsed)
            return transformers.AutoModelForCausalLM.from_config(parsed, trust_remote_code=False)
    except BUILD_ERRORS as error:
        raise cannot_build(directory, error, repr(names or config.get("model_type"))) from error


def cannot_build(directory: Path, error: Exception, name: str = "the model") -> InputRefused:
    """What to raise for one of BUILD_ERRORS."""
    return InputRefused(
        f"transformers {transformers.__version__} cannot build {name} from {directory}/config.json "
        f"({str(error).splitlines()[0][:200] if str(error) else type(error).__name__})",
        expected="a configuration of an architecture that transformers has",
        todo="check config.json; models that need their own code are not supported",
    )


class _quiet:
    """transformers' loggers raised to errors while a model without weights is built."""

    def __enter__(self) -> None:
        self.logger = logging.getLogger("transformers")
        self.level = self.logger.level
        self.logger.setLevel(logging.ERROR)

    def __exit__(self, *exc: object) -> None:
        self.logger.setLevel(self.level)


def find_name(name: str, known: Mapping[str, Any], prefix: str) -> str | None:
    """`name` as `known` spells it: as it is, or with or without the base model's prefix (`transformer.`)."""
    for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        if candidate in known:
            return candidate
    return None
