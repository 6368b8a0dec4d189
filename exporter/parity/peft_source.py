"""Where the oracle's expected values come from: PEFT's own layers, one at a time, merged in float64.

LoRA factors alone are put on a base without weights (meta device), and the base's values of one module at a time are
put in. Everything else an adapter may hold (saved modules, biases, trained tokens, thirty other methods) needs the
base when it is loaded: there the whole fp32 model is loaded as its users load it, and its layers are copied one by one.
Orientation, scaling and formula are PEFT's in both.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from exporter.errors import InputRefused
from exporter.parity.bases import WRAPPERS, BaseOptions, load_base, meta_model, quiet
from exporter.parity.models import parameter_count, require_memory
from exporter.sources.adapter import LORA, Adapter
from exporter.sources.checkpoint import Checkpoint

ULP = 2.0**-24  # unit roundoff of float32
MEASURED = 4.0  # times what float32 cost PEFT's own layer: another order of summing may cost as much again


@dataclass(frozen=True, slots=True)
class Merged:
    """What PEFT makes of one parameter, float64 like all here.

    slack: what float32 arithmetic may add to each element before the rounding; None where nothing is computed and the
    value was only replaced. plain: the same without the magnitude, for DoRA. rank, scaling, alpha: of a LoRA weight.
    """

    value: torch.Tensor
    slack: torch.Tensor | None
    plain: torch.Tensor | None = None
    rank: int | None = None
    scaling: float = 0.0
    alpha: float = 0.0


class Source(Protocol):
    """One adapter on the base. Names are those of the model's state dict."""

    def names(self) -> list[str]:
        """Parameters that the adapter changes or replaces, in the model's order."""
        ...

    def merge(self, name: str, original: torch.Tensor, loaded: Mapping[str, torch.Tensor]) -> Merged:
        """original: the base's value of `name`; loaded: the base's values of its module, by parameter."""
        ...

    def release(self) -> None:
        """Give memory back that the next call can have again."""
        ...


def open_source(base: Checkpoint, adapter: Adapter, options: BaseOptions) -> Source:
    """InputRefused where the adapter does not fit the base or PEFT cannot merge it."""
    if adapter.method == LORA and all(".lora_" in name for name in adapter.tensors):
        return LoraFactors(base, adapter)
    return WholeModel(base, adapter, options)


class LoraFactors:
    """LoRA and DoRA of linear layers and embeddings, with the bias of B: PEFT's layers without the base's weights."""

    def __init__(self, base: Checkpoint, adapter: Adapter) -> None:
        from peft.tuners.lora import LoraLayer

        self._layers: dict[str, Any] = {}
        for path, module in _meta_peft(base, adapter.directory).named_modules():
            if isinstance(module, LoraLayer):
                self._layers[path.removeprefix("base_model.model.")] = module

    def names(self) -> list[str]:
        found = []
        for path, layer in self._layers.items():
            found.append(f"{path}.weight")
            if any(layer.lora_bias.values()):
                found.append(f"{path}.bias")
        return found

    def merge(self, name: str, original: torch.Tensor, loaded: Mapping[str, torch.Tensor]) -> Merged:
        path, _, parameter = name.rpartition(".")
        layer = _with_values(self._layers[path], loaded)
        return _merge_lora(layer, parameter, original)

    def release(self) -> None:
        """Factors are small."""


class WholeModel:
    """Any adapter on the whole fp32 model, loaded when it is first needed and again after `release`."""

    def __init__(self, base: Checkpoint, adapter: Adapter, options: BaseOptions) -> None:
        self._base, self._adapter, self._options = base, adapter, options
        self._model: Any = None
        self._names: list[str] | None = None

    def names(self) -> list[str]:
        if self._names is None:
            self._names = self._find_names()
        return self._names

    def merge(self, name: str, original: torch.Tensor, loaded: Mapping[str, torch.Tensor]) -> Merged:
        path, _, parameter = name.rpartition(".")
        layer, rest = _outermost(self._open(), path)
        if layer is None:
            return Merged(_value(self._open().get_submodule(path), parameter), None)
        if _is_replacement(layer, self._adapter.method):
            return Merged(_merge_copy(layer, torch.float64)[rest + parameter], None)
        before = _value(layer.get_base_layer(), parameter)
        value = _merge_copy(layer, torch.float64)[parameter]
        if torch.equal(value, before):  # a trained bias beside a LoRA weight: replaced, and nothing computed
            return Merged(value, None)
        if self._adapter.method == LORA:
            return _merge_lora(copy.deepcopy(layer).double(), parameter, before)
        single = _merge_copy(layer, torch.float32)[parameter].double()
        return Merged(value, _measured_slack(value, single, before))

    def release(self) -> None:
        self._model = None

    def is_shared(self, first: str, second: str) -> bool:
        """True where two names are one parameter of the loaded model that no layer of PEFT's stands before."""
        values = []
        for name in (first, second):
            path, _, parameter = name.rpartition(".")
            if _outermost(self._open(), path)[0] is not None:
                return False
            values.append(getattr(self._open().get_submodule(path), parameter))
        return values[0] is values[1]

    def _open(self) -> Any:
        if self._model is None:
            require_memory(parameter_count(self._base) * 4 * 1.15, "PEFT's own merge in fp32")
            self._model = _whole_peft(self._base, self._adapter, self._options)
        return self._model

    def _find_names(self) -> list[str]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        model = self._open()
        plain = {WRAPPERS.sub("", name) for name in self._adapter.tensors}
        found: list[str] = []
        for path, module in meta_model(self._base.directory).named_modules():
            parameters = [name for name, _ in module.named_parameters(recurse=False)]
            layer = _outermost(model, path)[0] if parameters else None
            saved = [name for name in parameters if f"{path}.{name}" in plain]
            if layer is None or _is_replacement(layer, self._adapter.method):
                found += [f"{path}.{name}" for name in (saved if layer is None else parameters)]
                continue
            if not isinstance(layer, BaseTunerLayer):
                raise InputRefused(f"{path!r} is wrapped as a {type(layer).__name__}", expected="a layer of PEFT's")
            merged = _merge_copy(layer, torch.float64)
            before = {name: _value(layer.get_base_layer(), name) for name in parameters}
            changed = [n for n in parameters if n in saved or not torch.equal(merged[n], before[n])]
            found += [f"{path}.{name}" for name in changed or parameters[:1]]
        return found


def _outermost(model: Any, path: str) -> tuple[Any | None, str]:
    """PEFT's wrapper at or above the base's module `path`, or None, and the rest of the path below it with its dot."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    module = model
    parts = path.split(".") if path else []
    for i, part in enumerate(parts):
        module = getattr(module, part)
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            return module, "".join(f"{rest}." for rest in parts[i + 1 :])
    return None, ""


def _is_replacement(layer: Any, method: str) -> bool:
    """Layers that put trained values into the place of the base's, without arithmetic."""
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    if isinstance(layer, TrainableTokensWrapper) and isinstance(layer.original_module, BaseTunerLayer):
        raise InputRefused("trained tokens of a module that is adapted too", todo="verify has no bound for it yet")
    kinds = TrainableTokensWrapper | TrainableTokensLayer | ModulesToSaveWrapper
    return isinstance(layer, kinds) or method == "LN_TUNING"


def _merge_copy(layer: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The parameters of the layer's module after PEFT's merge in `dtype`; `layer` stays as it is."""
    return _unload(copy.deepcopy(layer).to(dtype))


def _unload(layer: Any) -> dict[str, torch.Tensor]:
    """PEFT's own unloading of one layer, which is used up."""
    try:
        with torch.no_grad(), quiet():
            if hasattr(layer, "unload_and_optionally_merge_module"):
                module = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            else:
                layer.merge()
                module = layer.get_base_layer()
    except Exception as error:  # thirty methods raise what they like
        raise InputRefused(
            f"PEFT cannot merge a {type(layer).__name__}: {type(error).__name__}: {str(error)[:300]}",
            expected="an adapter that PEFT merges",
        ) from error
    return {name: value.detach() for name, value in module.named_parameters()}


def _value(module: Any, parameter: str) -> torch.Tensor:
    return getattr(module, parameter).detach().double()


def _with_values(layer: Any, loaded: Mapping[str, torch.Tensor]) -> Any:
    """A float64 copy of a LoRA layer with the base's values in it."""
    copied = copy.deepcopy(layer).double()
    base = copied.get_base_layer()
    for parameter, value in loaded.items():
        setattr(base, parameter, torch.nn.Parameter(value.clone().double(), requires_grad=False))
    return copied


def _merge_lora(layer: Any, parameter: str, original: torch.Tensor) -> Merged:
    """layer: a float64 copy, which is used up. original: the value that PEFT adds to.

    slack. weight: (r + 2) 2^-24 |s| (|B| |A|), the inner products of r terms, the scale and the sum (Higham, "Accuracy
    and Stability of Numerical Algorithms", section 3.5). bias: 2^-23 |s b|. DoRA: see `_dora_slack`.
    """
    (name,) = layer.active_adapters
    if parameter != "weight":
        value = _unload(layer)[parameter]
        return Merged(value, 2 * ULP * (value - original).abs())
    rank, scaling, alpha = int(layer.r[name]), float(layer.scaling[name]), float(layer.lora_alpha[name])
    slack = (rank + 2) * ULP * _absolute(layer, name)
    plain, dora, embedding = (
        None,
        bool(layer.use_dora.get(name)),
        isinstance(layer.get_base_layer(), torch.nn.Embedding),
    )
    axis = 1 if not embedding and not getattr(layer, "fan_in_fan_out", False) else 0
    if dora:
        plain = original + layer.get_delta_weight(name).detach()
    value = _unload(layer)["weight"]
    if plain is not None:
        slack = _dora_slack(value, plain, slack, axis)
    return Merged(value, slack, plain, rank, scaling, alpha)


def _dora_slack(value: torch.Tensor, plain: torch.Tensor, error: torch.Tensor, axis: int) -> torch.Tensor:
    """For W' = f V with f = m / ||V|| over the n inputs along `axis`, where V is known to `error`.

    f error: V's own. |W'| ||error|| / ||V||: what that error does to the norm. (sqrt(n) + 4) 2^-24 |W'|: the norm's n
    rounded sums, whose errors add up like a random walk (Higham and Mary, "A New Approach to Probabilistic Rounding
    Error Analysis", 2019), the root, the quotient, and the products.
    """
    norm = torch.linalg.norm(plain, dim=axis, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    factor = torch.linalg.norm(value, dim=axis, keepdim=True) / norm
    spread = torch.linalg.norm(error, dim=axis, keepdim=True) / norm
    rounding = (math.sqrt(plain.shape[axis]) + 4) * ULP
    return factor * (error + ULP * plain.abs()) + value.abs() * (spread + rounding)


def _measured_slack(value: torch.Tensor, single: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """The bound of a method whose arithmetic only PEFT knows: what float32 costs PEFT's own layer, times MEASURED.

    value, single: PEFT's merge in float64 and in float32. The largest difference over the tensor, and at least 2^-24 of
    the largest change; nothing for an element that neither merge touches.
    """
    change = (value - before).abs().max()
    error = MEASURED * torch.maximum((single - value).abs().max(), ULP * change)
    touched = (value != before) | (single != before)
    return torch.where(touched, error, 0.0)


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


def _meta_peft(base: Checkpoint, directory: Path) -> Any:
    from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    config = PeftConfig.from_pretrained(str(directory))
    config.inference_mode = True
    with quiet():  # PEFT warns that it flips fan_in_fan_out for Conv1D: that is the wanted orientation
        try:
            model = PeftModel(meta_model(base.directory), config, low_cpu_mem_usage=True)
            for module in model.modules():
                if isinstance(module, LoraLayer):
                    # PEFT moves a loaded adapter to its base layer's device and type: not to meta, not to float16.
                    module.get_base_layer().weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
            state = load_peft_weights(str(directory), device="cpu")
            outcome = set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _does_not_fit(directory, error) from error
    _require_all([name for name in outcome.missing_keys if ".lora_" in name], list(outcome.unexpected_keys))
    return model


def _whole_peft(base: Checkpoint, adapter: Adapter, options: BaseOptions) -> Any:
    """The base's model with PEFT's wrappers in it, as `PeftModel.from_pretrained` makes it."""
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    model = load_base(base.directory, options)
    own = set(model.state_dict())
    with quiet():
        try:
            peft: Any = PeftModel.from_pretrained(model, str(adapter.directory)).eval()
            expected = set(get_peft_model_state_dict(peft, save_embedding_layers=False))
            given = set(load_peft_weights(str(adapter.directory), device="cpu"))
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise _does_not_fit(adapter.directory, error) from error
    foreign = [n for n in given - expected if WRAPPERS.sub("", n.removeprefix("base_model.model.")) not in own]
    _require_all(sorted(expected - given), sorted(foreign))
    return peft.base_model.model


def _does_not_fit(directory: Path, error: Exception) -> InputRefused:
    return InputRefused(
        f"{directory} does not fit the base: {str(error)[:300]}", expected="the base this adapter was trained on"
    )


def _require_all(missing: list[str], unexpected: list[str]) -> None:
    if missing or unexpected:
        odd = (missing or unexpected)[0]
        raise InputRefused(
            f"{len(missing)} adapter tensor(s) missing and {len(unexpected)} unexpected, such as {odd!r}",
            expected="every target with its A and B (or what its method trains), and no more",
            todo="check that the adapter belongs to this base",
        )
