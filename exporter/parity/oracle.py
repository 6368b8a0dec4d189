"""What PEFT itself makes of the adapter, module by module in float64: the oracle for weights.

The base is built on the meta device (no memory), the adapter is loaded, and for one module at a time the base's weight
is put in and PEFT merges it. Orientation, scaling and formula are PEFT's, not ours: the check does not share the
merge stage's code.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from exporter.errors import InputRefused
from exporter.sources.checkpoint import Checkpoint, read_tensor

Float = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Adapted:
    """One weight that the adapter changes. `merged` is PEFT's merge in float64, in the checkpoint's orientation.

    slack: sum_k (r_k + 2) 2^-24 |weight_k s_k| (|B_k| |A_k|), what float32 accumulation may add before the rounding.
    """

    name: str  # without the model's prefix
    original: Float
    merged: Float
    slack: Float
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    alphas: tuple[float, ...]

    @property
    def delta(self) -> Float:
        return self.merged - self.original


class Oracle:
    """PEFT's models of one base with each adapter, on the meta device."""

    def __init__(self, base: Checkpoint, adapters: Sequence[tuple[Path, float]]) -> None:
        self.base = base
        self.weights = tuple(weight for _, weight in adapters)
        self.models = [_meta_peft(base, directory) for directory, _ in adapters]
        self.prefix = _prefix(self.models[0])
        self.parameters = frozenset(_parameters(base.directory))

    @property
    def names(self) -> list[str]:
        """Names of the adapted weights, without the model's prefix, in the model's order."""
        found: dict[str, None] = {}
        for model in self.models:
            found.update(dict.fromkeys(self.canonical(f"{path}.weight") for path, _ in _layers(model)))
        return list(found)

    def canonical(self, name: str) -> str:
        """A tensor's name without the prefix that some checkpoints carry and some do not."""
        return name.removeprefix(self.prefix)

    def base_tensor(self, name: str) -> str:
        """The checkpoint's own name for a canonical one."""
        for candidate in (name, self.prefix + name):
            if candidate in self.base.tensors:
                return candidate
        raise InputRefused(
            f"the base has no tensor {name!r}, which the adapter changes",
            expected="the base this adapter was trained on",
        )

    def adapted(self) -> Iterator[Adapted]:
        """Each weight that some adapter changes, merged by PEFT in float64."""
        for name in self.names:
            yield self.merge(name)

    def merge(self, name: str) -> Adapted:
        original = read_tensor(self.base.tensors[self.base_tensor(name)]).double()
        merged, slack = original.clone(), torch.zeros_like(original)
        ranks, scalings, alphas = [], [], []
        for model, weight in zip(self.models, self.weights, strict=True):
            for path, layer in _layers(model):
                if self.canonical(f"{path}.weight") != name:
                    continue
                change, bound, rank, scaling, alpha = _merge_layer(layer, original)
                merged += weight * change
                slack += abs(weight) * bound
                ranks, scalings, alphas = [*ranks, rank], [*scalings, weight * scaling], [*alphas, weight * alpha]
        return Adapted(
            name, original.numpy(), merged.numpy(), slack.numpy(), tuple(ranks), tuple(scalings), tuple(alphas)
        )


def _merge_layer(layer: Any, original: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int, float, float]:
    """(change, slack) shaped like `original`, and r, the scaling, alpha. PEFT's `merge` in float64."""
    (name,) = layer.active_adapters
    for factors in (layer.lora_A, layer.lora_B, layer.lora_embedding_A, layer.lora_embedding_B):
        if name in factors:
            factors[name] = factors[name].double()
    base = layer.get_base_layer()
    kept = base.weight
    base.weight = torch.nn.Parameter(original.clone(), requires_grad=False)
    with torch.no_grad():
        layer.merge(adapter_names=[name])
        change = base.weight.detach() - original
        layer.merged_adapters.clear()
        base.weight = kept
        bound = _absolute(layer, name)
    rank, scaling = int(layer.r[name]), float(layer.scaling[name])
    return change, (rank + 2) * 2.0**-24 * bound, rank, scaling, float(layer.lora_alpha[name])


def _absolute(layer: Any, name: str) -> torch.Tensor:
    """|s| |B| |A| in the base's orientation: PEFT's own delta of the factors' absolute values."""
    scaling = layer.scaling[name]
    kept = []
    for factors in (layer.lora_A, layer.lora_B, layer.lora_embedding_A, layer.lora_embedding_B):
        if name in factors:
            parameter = factors[name].weight if hasattr(factors[name], "weight") else factors[name]
            kept.append((parameter, parameter.data))
            parameter.data = parameter.data.abs()
    layer.scaling[name] = abs(scaling)
    bound = layer.get_delta_weight(name).detach()
    layer.scaling[name] = scaling
    for parameter, data in kept:
        parameter.data = data
    return bound


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    """(module path in the base model, PEFT layer)."""
    from peft.tuners.lora import LoraLayer

    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield path.removeprefix("base_model.model."), module


def meta_model(directory: Path) -> Any:
    """The base's architecture without weights. Code in the directory is never run."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _parameters(directory: Path) -> list[str]:
    model = meta_model(directory)
    prefix = _prefix(model)
    return [name.removeprefix(prefix) for name in model.state_dict()]


def _prefix(model: Any) -> str:
    prefix = getattr(getattr(model, "base_model", model), "model", model)
    name = getattr(prefix, "base_model_prefix", "")
    return f"{name}." if name else ""


def _meta_peft(base: Checkpoint, directory: Path) -> Any:
    from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
    from peft.tuners.lora import LoraConfig

    config = PeftConfig.from_pretrained(str(directory))
    if not isinstance(config, LoraConfig) or config.use_dora:
        kind = "DoRA" if isinstance(config, LoraConfig) else config.peft_type
        raise InputRefused(
            f"{directory} is a {kind} adapter", expected="plain LoRA", todo="verify has no bound for it yet"
        )
    config.inference_mode = True
    with warnings.catch_warnings():
        # PEFT warns that it flips fan_in_fan_out for Conv1D: that is the wanted orientation.
        warnings.simplefilter("ignore")
        model = PeftModel(meta_model(base.directory), config, low_cpu_mem_usage=True)
        for _, layer in _layers(model):
            # PEFT moves a loaded adapter to its base layer's device and type: not to meta, not to float16.
            layer.get_base_layer().weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
        state = load_peft_weights(str(directory), device="cpu")
        try:
            outcome = set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
        except RuntimeError as error:
            raise InputRefused(
                f"{directory} does not fit the base: {str(error)[:300]}",
                expected="the base this adapter was trained on",
            ) from error
    missing = [name for name in outcome.missing_keys if ".lora_" in name]
    if missing or outcome.unexpected_keys:
        odd = (missing or list(outcome.unexpected_keys))[0]
        raise InputRefused(
            f"{len(missing)} adapter tensor(s) missing and {len(outcome.unexpected_keys)} unexpected, such as {odd!r}",
            expected="every target with its A and B, and no more",
            todo="check that the adapter belongs to this base",
        )
    return model
