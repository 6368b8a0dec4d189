"""From the tensors of a LoRA adapter to what each does: every tensor is consumed here or refused by name.

Names are PEFT's (`peft/utils/save_and_load.py`): `<module>.lora_A.weight`, with or without an adapter's name,
`lora_embedding_A` and `lora_magnitude_vector` without `.weight`; `.base_layer.` stands where modules were wrapped.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from exporter.errors import InputRefused
from exporter.merging.changes import AddVector, Change, LowRank, PeftLayer, WeightDecomposed
from exporter.merging.modules import ModelLayout, ModuleInfo, find_name
from exporter.sources.adapter import CONFIG, Adapter
from exporter.sources.tensors import FLOATS, TensorInfo

FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<factor>A|B|embedding_A|embedding_B|magnitude_vector)"
    r"(?:\.(?!(?:weight|bias)$)(?P<adapter>[^.]+))?(?:\.(?P<part>weight|bias))?"
)
WRAPPED = ".base_layer"


@dataclass(frozen=True, slots=True)
class _Group:
    """The factors of one wrapper. depth: how many wrappers of the same module stand outside of it."""

    module: str
    depth: int
    factors: Mapping[str, TensorInfo]  # "A", "B", "B.bias", "magnitude_vector"
    names: tuple[str, ...]


def lora_changes(
    adapter: Adapter, weight: float, layout: ModelLayout, sources: Mapping[str, TensorInfo]
) -> tuple[dict[str, list[Change]], set[str]]:
    """Changes by the name of the stored tensor, and the names of the adapter's tensors that they consume."""
    changes: dict[str, list[Change]] = {}
    consumed: set[str] = set()
    unmatched: list[str] = []
    groups = _groups(adapter)
    for group in groups:
        module = find_name(group.module, layout.modules, layout.prefix)
        if module is None:
            unmatched.append(group.module)
            continue
        for name, change in _changes_of(group, module, adapter, weight, layout, sources):
            changes.setdefault(layout.stored(name), []).append(change)
        consumed.update(group.names)
    if unmatched:
        _refuse_unmatched(adapter, len(groups), unmatched, layout)
    _check_every_target(adapter, {group.module for group in groups}, layout)
    _check_every_parameter(adapter, changes, layout)
    return changes, consumed


def _groups(adapter: Adapter) -> list[_Group]:
    found: dict[tuple[str, int], dict[str, tuple[str, TensorInfo]]] = {}
    adapter_names = set()
    for name, info in adapter.tensors.items():
        match = FACTOR.fullmatch(name)
        if match is None:
            continue
        adapter_names.add(match["adapter"])
        if info.dtype not in FLOATS:
            raise InputRefused(f"{name!r} is {info.dtype} {list(info.shape)}", expected="floats")
        factor = match["factor"].removeprefix("embedding_") + (".bias" if match["part"] == "bias" else "")
        module = match["module"]
        key = module.replace(WRAPPED, ""), module.count(WRAPPED)
        if factor in found.setdefault(key, {}):
            raise InputRefused(f"{adapter.file.name} holds {name!r} under two names", expected="each factor once")
        found[key][factor] = (name, info)
    if len(adapter_names) > 1:
        raise InputRefused(
            f"{adapter.file.name} holds several adapters: {sorted(map(str, adapter_names))}", expected="one"
        )
    return [
        _Group(
            module,
            depth,
            {factor: info for factor, (_, info) in entries.items()},
            tuple(name for name, _ in entries.values()),
        )
        for (module, depth), entries in sorted(found.items())
    ]


def _changes_of(
    group: _Group,
    module: str,
    adapter: Adapter,
    weight: float,
    layout: ModelLayout,
    sources: Mapping[str, TensorInfo],
) -> list[tuple[str, Change]]:
    info = layout.modules[module]
    targeted = _targeted_parameters(module, info, adapter.config)
    if targeted:
        return _stacked(group, module, targeted, info, adapter, weight, layout)
    if info.is_convolution:
        _refuse_weight(weight, group.module, "a convolution")
        own = {module + name.removeprefix(group.module): adapter.tensors[name] for name in group.names}
        parameters = {parameter: sources[f"{module}.{parameter}"] for parameter in info.parameters}
        return [
            (f"{module}.{parameter}", PeftLayer(module, parameter, adapter.method, adapter.config, own, parameters))
            for parameter in parameters
        ]
    if info.orientation is None:
        raise InputRefused(
            f"the adapter changes {group.module!r}, which is a {type(layout.model.get_submodule(module)).__name__}",
            expected="a Linear, Conv1D, Embedding or convolution",
            todo="check that the adapter was trained on this base",
        )
    return _matrix(group, module, info, adapter, weight)


def _matrix(group: _Group, module: str, info: ModuleInfo, adapter: Adapter, weight: float) -> list[tuple[str, Change]]:
    assert info.orientation is not None
    down, up = _pair(group)
    rank, scale = rank_and_scale(adapter.config, group.module)
    if len(down.shape) != 2 or len(up.shape) != 2 or down.shape[0] != rank or up.shape[1] != rank:
        _refuse_rank(group, down, up, rank)
    low_rank = LowRank(module, down, up, rank, scale * weight, info.orientation)
    changes: list[tuple[str, Change]] = []
    magnitude = group.factors.get("magnitude_vector")
    if bool(adapter.config.get("use_dora")) != (magnitude is not None):
        raise InputRefused(
            f"{group.module} has {'no' if magnitude is None else 'a'} lora_magnitude_vector",
            expected=f"one if, and only if, {CONFIG} says use_dora",
        )
    if magnitude is None:
        changes.append((f"{module}.weight", low_rank))
    else:
        _refuse_weight(weight, group.module, "DoRA")
        changes.append((f"{module}.weight", WeightDecomposed(low_rank, magnitude)))
    bias = group.factors.get("B.bias")
    if bool(adapter.config.get("lora_bias")) != (bias is not None):
        raise InputRefused(
            f"{group.module} has {'no' if bias is None else 'a'} bias of lora_B",
            expected=f"one if, and only if, {CONFIG} says lora_bias",
        )
    if bias is not None:
        if "bias" not in info.parameters:
            raise InputRefused(
                f"{group.module} has a bias of lora_B, and the base's module has none",
                expected="lora_bias on modules that have a bias",
                todo="such an adapter cannot be merged",
            )
        changes.append((f"{module}.bias", AddVector(module, bias, scale * weight)))
    return changes


def _pair(group: _Group) -> tuple[TensorInfo, TensorInfo]:
    for factor, other in (("A", "B"), ("B", "A")):
        if factor not in group.factors:
            raise InputRefused(
                f"{group.module} has lora_{other} and no lora_{factor}", expected="both factors of every module"
            )
    return group.factors["A"], group.factors["B"]


def _stacked(
    group: _Group,
    module: str,
    targeted: list[str],
    info: ModuleInfo,
    adapter: Adapter,
    weight: float,
    layout: ModelLayout,
) -> list[tuple[str, Change]]:
    """PEFT wraps a module once for each targeted parameter, in their order, so the last one is the outermost."""
    if group.depth >= len(targeted):
        raise InputRefused(
            f"{group.module} is wrapped {group.depth + 1} times", expected=f"{len(targeted)} targeted parameters"
        )
    parameter = targeted[len(targeted) - 1 - group.depth]
    name = f"{module}.{parameter}"
    shape = tuple(layout.model.get_parameter(name).shape)
    if len(shape) not in (2, 3):
        raise InputRefused(f"the adapter changes {name!r} of shape {list(shape)}", expected="two or three dimensions")
    experts = shape[0] if len(shape) == 3 else 1
    down, up = _pair(group)
    rank, scale = rank_and_scale(adapter.config, f"{group.module}.{parameter}")
    if len(down.shape) != 2 or len(up.shape) != 2 or down.shape[0] != rank * experts or up.shape[1] != rank * experts:
        _refuse_rank(group, down, up, rank * experts)
    orientation = "in_out" if experts > 1 and info.is_transposed else "out_in"
    change = LowRank(module, down, up, rank, scale * weight, orientation, experts)
    parts = layout.stacks.get(name)
    if parts is None:
        return [(name, change)]
    if not parts or orientation == "in_out" or (up.shape[0], down.shape[1]) != shape[1:]:
        raise InputRefused(
            f"the adapter changes {name!r}, which the base stores in {len(parts) or 'other'} tensors",
            expected="a stack of experts whose matrices are stored one by one",
            todo="train the adapter on the modules that the checkpoint stores",
        )
    return [(part.name, replace(change, part=part)) for part in parts]


def _targeted_parameters(module: str, info: ModuleInfo, config: Mapping[str, Any]) -> list[str]:
    targets = config.get("target_parameters") or []
    names = [(parameter, f"{module}.{parameter}") for parameter in info.parameters]
    return [p for p, name in names if any(name == target or name.endswith(f".{target}") for target in targets)]


def rank_and_scale(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """r, and what multiplies B A. Hu et al., LoRA (2021): alpha/r. Kalajdzievski, rsLoRA (2023): alpha/sqrt(r)."""
    rank = pattern_value(config.get("rank_pattern"), module, config["r"])
    alpha = pattern_value(config.get("alpha_pattern"), module, config["lora_alpha"])
    if int(rank) != rank:
        raise InputRefused(f"rank_pattern gives {module} the rank {rank}", expected="a whole number")
    return int(rank), float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def pattern_value(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's get_pattern_key: the first key that equals the module's name or its end after a dot, as a regex."""
    for key, value in (pattern or {}).items():
        try:
            matched = re.match(rf"(.*\.)?({key})$", module)
        except (re.error, RecursionError, OverflowError) as error:
            raise InputRefused(f"the pattern {key[:80]!r} is not a regular expression ({error})") from error
        if matched:
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e9:
                raise InputRefused(f"the pattern {key!r} has the value {value!r}", expected="a positive number")
            return value
    return default


def _refuse_rank(group: _Group, down: TensorInfo, up: TensorInfo, rank: int) -> None:
    raise InputRefused(
        f"{group.module} has factors of shape {list(down.shape)} and {list(up.shape)}",
        expected=f"rank {rank}, as {CONFIG} says",
        todo="check that weights and configuration belong together",
    )


def _refuse_weight(weight: float, module: str, what: str) -> None:
    if weight != 1:
        raise InputRefused(
            f"{module}: the weight {weight:g} for {what}", expected="weight 1: only sums can be weighted"
        )


def _refuse_unmatched(adapter: Adapter, count: int, unmatched: list[str], layout: ModelLayout) -> None:
    none = len(unmatched) == count
    raise InputRefused(
        f"{'none' if none else len(unmatched)} of the {count} modules in {adapter.directory} "
        f"{'match' if none else 'do not match'} the base: {unmatched[0]!r}"
        + (f" and {len(unmatched) - 1} more" if unmatched[1:] else ""),
        expected="names of the base's modules such as " + repr(next(iter(layout.matrices), "none")),
        todo="check that the adapter was trained on this base: " + repr(adapter.config.get("base_model_name_or_path")),
    )


def _check_every_target(adapter: Adapter, present: set[str], layout: ModelLayout) -> None:
    """A list of target modules names what was trained: each such module of the model must have its factors."""
    targets, layers = adapter.config.get("target_modules"), adapter.config.get("layers_to_transform")
    if not isinstance(targets, list) or layers is not None or adapter.config.get("exclude_modules"):
        return
    known = {find_name(module, layout.modules, layout.prefix) for module in present}
    wanted = [m for m in layout.matrices if any(m == t or m.endswith(f".{t}") for t in targets)]
    missing = [module for module in wanted if module not in known]
    if missing:
        raise InputRefused(
            f"{adapter.directory} targets {', '.join(map(str, targets))} and has no factors for {missing[0]!r}"
            + (f" and {len(missing) - 1} more" if missing[1:] else ""),
            expected=f"factors for all {len(wanted)} modules of these names",
            todo="the adapter file is incomplete, or it was trained on a smaller base",
        )


def _check_every_parameter(adapter: Adapter, changes: Mapping[str, list[Change]], layout: ModelLayout) -> None:
    """`target_parameters` names bare parameters, such as stacks of experts: each of them must have its factors."""
    for target in adapter.config.get("target_parameters") or []:
        known = [*layout.state, *layout.renamed, *layout.stacks]
        wanted = [name for name in known if name == target or name.endswith(f".{target}")]
        missing = [
            name
            for name in wanted
            if not changes.keys() & {layout.stored(name), *(p.name for p in layout.stacks.get(name, ()))}
        ]
        if not wanted or missing:
            raise InputRefused(
                f"{adapter.directory} targets the parameter {target} and has no factors for "
                f"{missing[0] if missing else 'it'!r}",
                expected="factors for every parameter of the base that target_parameters names",
                todo="check that the adapter is complete and was trained on this base",
            )
