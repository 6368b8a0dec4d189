"""Merge one module with PEFT's own layer, for the adapter methods whose arithmetic PEFT owns.

PEFT's tuner is run on a copy of the model that has weights in one module only. So the whole model is never held, and
the result has the very bits that `PeftModel.from_pretrained(...).merge_and_unload()` gives on the float32 model with
as many threads. What PEFT does silently (a missing tensor, an unknown config field) is refused.
"""

import copy
import dataclasses
import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import peft
import torch
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.boft import layer as boft_layer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils.save_and_load import set_peft_model_state_dict

from exporter.errors import InputRefused

# fmt: off
MERGEABLE: frozenset[str] = frozenset({
    "ADALORA", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "GLORA", "GRALORA", "HIRA", "HRA", "IA3",
    "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "PVERA", "RANDLORA", "ROAD", "SHIRA",
    "SUPERTUNING", "TINYLORA", "UNILORA", "VBLORA", "VERA", "WAVEFT",
})
# fmt: on
# Left out:
# LORA, TRAINABLE_TOKENS: the engine's own arithmetic; PEFT's trainable tokens also reach into the tied head.
# LILY, POLY, SHADOW, XLORA: the update depends on the input (a router or a second network), so PEFT has no merge.
# FROD: one decomposition of every targeted weight together, made again at each load even where it was saved.
# ADAMSS: clusters the weight's singular vectors at load, with scikit-learn, which is not a dependency.
# BONE: gone from PEFT; MISS took its place.
# Prompt methods (PROMPT_TUNING, P_TUNING, PREFIX_TUNING, CPT, CARTRIDGE, ADAPTION_PROMPT, ...): no weight to change.

CONVOLUTIONS = "LORA"  # of a convolution: its kernels are no matrices that the engine's own arithmetic adds
ADAPTER = "default"  # the name that from_pretrained gives
WRAPPER = "base_model.model."  # what PeftModel puts before the base's names

# Fields that rebuild the model or aim at bare parameters: no single module holds what they change.
MODEL_WIDE_FIELDS = ("layer_replication", "target_parameters")


class AdapterNames(NamedTuple):
    """modules: the adapter's tensors by the module they change. shared: tensors that every module needs.

    rest: tensors of no adapter layer: modules_to_save, trainable tokens, biases and embeddings of other modules.
    """

    modules: dict[str, list[str]]
    shared: list[str]
    rest: list[str]


def split_names(names: Iterable[str], peft_type: str) -> AdapterNames:
    """Sort the names of adapter_model.safetensors, stripped of `base_model.model.`, by the module they belong to.

    Shared names keep their `base_model.` (`base_model.vera_A`). InputRefused for a type outside MERGEABLE.
    """
    mark = f".{_method(peft_type).prefix}"
    split = AdapterNames({}, [], [])
    others = []
    for name in names:
        if name.startswith("base_model."):
            split.shared.append(name)
        elif mark in name:
            split.modules.setdefault(name.rsplit(mark, 1)[0], []).append(name)
        else:
            others.append(name)
    for name in others:  # a trained bias or a saved embedding of a module that also has an adapter
        split.modules.get(name.rsplit(".base_layer.", 1)[0], split.rest).append(name)
    return split


def targeted_modules(config: Mapping[str, Any], model: torch.nn.Module) -> list[str]:
    """The modules that PEFT would adapt, in the model's order: those to merge.

    Each has tensors of its own in the adapter, save that a Uni-LoRA adapter may be one shared vector.
    config: the JSON of adapter_config.json. model: on the meta device; it is not changed. Raises InputRefused.
    """
    try:
        method = _method(config.get("peft_type"))
        resolved = _resolve_targets(method, _parse(method, config), model)
        return [name for name, _ in model.named_modules() if _is_target(method, resolved, name)]
    except Exception as error:
        raise _refusal("adapter_config.json", error) from error


def merge_module(
    *,
    config: Mapping[str, Any],
    name: str,
    layer: torch.nn.Module,
    model: torch.nn.Module,
    tensors: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """The values that merging the adapter changes, float32, by their name below the module ("weight", "bias").

    config: the JSON of adapter_config.json. name: the module's full name in `model`. layer: that module, of the base's
    own class, float32 on the CPU; it is used up: its weights are merged in place. model: the whole model on the meta
    device, which lends its structure and is not changed. tensors: what `split_names` gives for this module and as
    shared. Not for several threads at once: PEFT's warnings are silenced for the whole process meanwhile.

    Shared projections that were not saved (VeRA, PVeRA, RandLoRA, TinyLoRA, Uni-LoRA) are made from the seed in the
    config, as PEFT does. Orientation is the layer's class's, whatever `fan_in_fan_out` says.
    Peak memory beyond `layer` and `tensors`, in sizes of a square layer: 1.5 for IA3, MISS, PVERA, UNILORA, VBLORA and
    VERA; 3 for ADALORA, DEFT, DELORA, GRALORA, LN_TUNING, LOKR and OFT; 4 for HRA, LOHA, PEANUT, ROAD and SHIRA; 6 for
    FOURIERFT, GLORA, HIRA, RANDLORA, SUPERTUNING and WAVEFT; 8 for BOFT, C3A, OSF, PSOFT and TINYLORA. BOFT, C3A and
    HRA make (in, in) matrices, so a wide input costs more.
    Raises InputRefused, naming the module, for a config field that the installed peft does not know, a tensor that is
    missing, left over or of the wrong shape, and everything that PEFT refuses.
    """
    try:
        with _guarded(), torch.random.fork_rng(devices=[]), torch.no_grad():
            before = _digests(layer)
            merged = _merge(config, name, layer, model, tensors)
            after = _digests(merged)
    except Exception as error:
        raise _refusal(repr(name), error) from error
    state = merged.state_dict()
    return {key: state[key] for key in after if after[key] != before.get(key)}


class _Method(NamedTuple):
    """What PEFT registers for an adapter type. prefix begins the names of its parameters: `hada_`."""

    config: type[PeftConfig]
    tuner: type[BaseTuner]
    prefix: str


def _method(peft_type: object) -> _Method:
    if not isinstance(peft_type, str) or peft_type not in MERGEABLE | {CONVOLUTIONS} or peft_type not in list(PeftType):
        raise InputRefused(
            f"a {peft_type} adapter cannot be merged with peft {peft.__version__}",
            expected=f"one of {', '.join(sorted(MERGEABLE))}",
        )
    known = PeftType(peft_type)
    return _Method(
        PEFT_TYPE_TO_CONFIG_MAPPING[known], PEFT_TYPE_TO_TUNER_MAPPING[known], PEFT_TYPE_TO_PREFIX_MAPPING[known]
    )


def _merge(
    fields: Mapping[str, Any],
    name: str,
    layer: torch.nn.Module,
    model: torch.nn.Module,
    tensors: Mapping[str, torch.Tensor],
) -> torch.nn.Module:
    method = _method(fields.get("peft_type"))
    skeleton = copy.deepcopy(model)  # meta tensors: structure only
    skeleton.set_submodule(name, layer)
    config = _resolve_targets(method, _parse(method, fields), skeleton)
    if not _is_target(method, config, name):
        raise InputRefused("the adapter has tensors for this module, but its config does not target it")
    _forget_other_modules(config, name)
    # A state dict tells PEFT which modules to adapt, while it still sees the sizes of all that the config targets.
    only = {f"{name}.{method.prefix}": torch.empty(0)}
    if config.peft_type == "UNILORA" and not config.save_indices:  # it deals one permutation out to all modules
        only = None
        _stand_in_for_weights(skeleton)
    tuner = method.tuner(skeleton, {ADAPTER: config}, ADAPTER, state_dict=only)
    tuner._cast_adapter_dtype(ADAPTER)
    adapted = skeleton.get_submodule(name)
    if not isinstance(adapted, BaseTunerLayer):
        raise InputRefused(f"PEFT cannot adapt a {type(layer).__name__} with {config.peft_type}")
    tuner.eval()  # as from_pretrained does
    _load(_Holder(tuner), config, name, tensors)
    adapted.merge()
    return adapted.get_base_layer()


class _Holder(torch.nn.Module):
    """Stands where PeftModel would, so that names begin with `base_model.` as they do in an adapter's file."""

    def __init__(self, tuner: BaseTuner) -> None:
        super().__init__()
        self.base_model = tuner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)


def _load(holder: _Holder, config: Any, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Load the adapter's tensors; InputRefused unless they are exactly what the injected layer holds."""
    named = [key for key in tensors if ADAPTER in key.removeprefix(name).split(".")]
    if named:
        raise InputRefused(f"{named[0]!r} carries an adapter's name", expected="names as save_pretrained writes them")
    given = {key if key.startswith("base_model.") else WRAPPER + key: tensor for key, tensor in tensors.items()}
    result = set_peft_model_state_dict(holder, given, adapter_name=ADAPTER)
    state = holder.state_dict(keep_vars=True)
    missing = set(result.missing_keys)
    own = f"{WRAPPER}{name}."
    loaded = {id(tensor) for key, tensor in state.items() if key not in missing}  # shared tensors have many names
    lacking = [
        key
        for key in missing
        if (key.startswith(own) or not key.startswith(WRAPPER))
        and not key.startswith(f"{own}base_layer.")
        and not key.endswith(f".ranknum.{ADAPTER}")  # AdaLoRA's rank, never saved
        and id(state[key]) not in loaded
    ]
    if getattr(config, "bias", "none") != "none" and f"{own}base_layer.bias" in missing:
        lacking.append(f"{own}base_layer.bias")
    if config.peft_type == "SHIRA" and f"{own}shira_indices" not in given:  # no buffer: PEFT would draw a mask
        lacking.append(f"{own}shira_indices")
    for which in ("randlora_A", "randlora_B"):  # RandLoRA saves its shared projections with every module again
        copied = given.get(f"{own}{which}")
        if copied is not None and not torch.equal(copied, given.get(f"base_model.{which}", copied)):
            raise InputRefused(f"the adapter's {name}.{which} differs from base_model.{which}", expected="a copy of it")
    extra = set(result.unexpected_keys)
    if config.peft_type == "TINYLORA":  # one vector for each group of modules, of which this one is in one
        groups = max(1, round(len(holder._target_key_to_idx[ADAPTER]) * (1 - config.weight_tying)))
        extra -= {f"base_model.tinylora_v.{ADAPTER}.{group}" for group in range(groups)}
    if lacking or extra:
        raise InputRefused(
            "the adapter's tensors do not fit: "
            + "; ".join(f"{what} {sorted(keys)}" for what, keys in (("missing", lacking), ("left over", extra)) if keys)
        )


def _parse(method: _Method, fields: Mapping[str, Any]) -> PeftConfig:
    known = {field.name for field in dataclasses.fields(method.config) if field.init}
    if unknown := sorted(set(fields) - known):
        raise InputRefused(
            f"adapter_config.json has {', '.join(unknown)}, which peft {peft.__version__} does not know",
            todo="install the version of peft that wrote the adapter",
        )
    for field in MODEL_WIDE_FIELDS:
        if fields.get(field):
            raise InputRefused(f"{fields['peft_type']} with {field} is not supported", expected=f"no {field}")
    parsed = method.config(**method.config.check_kwargs(**copy.deepcopy(dict(fields))))
    parsed.inference_mode = True  # as from_pretrained does
    return parsed


def _resolve_targets(method: _Method, config: PeftConfig, model: torch.nn.Module) -> Any:
    """`config` with the target modules that PEFT infers, from the model's type or from "all-linear"."""
    blank = method.tuner.__new__(method.tuner)  # what it infers depends on the class alone
    torch.nn.Module.__init__(blank)
    return _maybe_include_all_linear_layers(
        blank._prepare_adapter_config(config, BaseTuner.get_model_config(model)), model
    )


def _is_target(method: _Method, config: PeftConfig, name: str) -> bool:
    return bool(name) and bool(method.tuner._check_target_module_exists(config, name))


def _stand_in_for_weights(model: torch.nn.Module) -> None:
    """Replace meta parameters by a single zero expanded to their shape: PEFT follows them from device to device."""
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                zero = torch.zeros(()).expand(parameter.shape)
                setattr(module, key, torch.nn.Parameter(zero, requires_grad=False))


def _forget_other_modules(config: Any, name: str) -> None:
    """Drop what a config says about other modules: PEFT would wrap them, or look for adapters that they do not have."""
    config.modules_to_save = None
    config.trainable_token_indices = None
    if config.peft_type == "ADALORA" and config.rank_pattern:
        config.rank_pattern = {key: kept for key, kept in config.rank_pattern.items() if key.startswith(f"{name}.")}


@contextmanager
def _guarded() -> Iterator[None]:
    """PEFT without its warnings (what it only warns about is checked here), compiler and unchecked memory accesses."""
    before = boft_layer._FBD_CUDA
    boft_layer._FBD_CUDA = False  # else PEFT compiles a CUDA extension, which is of no use on the CPU
    try:
        # SHiRA's indices come from the file; without the check, PyTorch follows them wherever they point.
        with warnings.catch_warnings(action="ignore"), torch.sparse.check_sparse_tensor_invariants():
            yield
    finally:
        boft_layer._FBD_CUDA = before


def _digests(module: torch.nn.Module) -> dict[str, bytes]:
    """What tells a changed tensor from an unchanged one without a second copy of it."""
    digests = {}
    for name, tensor in module.state_dict().items():
        if tensor.dtype != torch.float32 or tensor.is_meta:
            raise InputRefused(f"{name} is {tensor.dtype} on {tensor.device}", expected="float32 on the CPU")
        digests[name] = hashlib.sha256(tensor.contiguous().numpy()).digest()
    return digests


def _refusal(where: str, error: Exception) -> InputRefused:
    if isinstance(error, InputRefused):
        return InputRefused(f"{where}: {error.seen}", expected=error.expected, todo=error.todo)
    return InputRefused(
        f"{where}: peft {peft.__version__} refuses the adapter: {type(error).__name__}: {str(error)[:500]}",
        expected="an adapter that PEFT itself merges",
    )
