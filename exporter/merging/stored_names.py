"""The names that a checkpoint's files use, where the installed transformers calls the model's tensors otherwise.

transformers 5 renames tensors and stacks experts as it loads, and undoes both as it saves: the files stay as version 4
wrote them. A merge works on files, so the layout is brought into their names here.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from exporter.merging.changes import StackPart
from exporter.merging.modules import ModelLayout, ModuleInfo, find_name
from exporter.sources.tensors import TensorInfo

# A matrix that loading puts into a stack or a router of its own: in version 4 each was the weight of a Linear.
LINEAR = ModuleInfo("out_in", ("weight",), is_convolution=False, is_transposed=False)
OTHER = ModuleInfo(None, ("weight",), is_convolution=False, is_transposed=False)
# What loading may do to matrices that an adapter's delta can follow: stack experts, and put outputs below each other.
STACKING = ("MergeModulelist", "Concatenate")
EXPERT = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What loading makes of a stored tensor. name: the model's. pattern: which of its `parts`, None if it is all."""

    name: str
    parts: tuple[str, ...] = ()
    pattern: str | None = None
    is_stacked: bool = False


def as_stored(layout: ModelLayout, tensors: Mapping[str, TensorInfo]) -> ModelLayout:
    """`layout` with the names of `tensors` in place of those that loading would give them; else as it is."""
    unknown = [name for name in tensors if find_name(name, layout.state, layout.prefix) is None]
    transforms = _transforms(layout.model) if unknown else []
    if not transforms:
        return layout
    stored: dict[str, dict[str, _Loaded]] = {}
    for name in unknown:
        loaded = _load(name, transforms)
        known = find_name(loaded.name, layout.state, layout.prefix)
        if known is not None and (loaded.pattern or tensors[name].shape == layout.state[known]):
            stored.setdefault(known, {})[name] = loaded
    state: dict[str, tuple[int, ...]] = {}
    modules = dict(layout.modules)
    for name, shape in layout.state.items():
        if name not in stored:
            state[name] = shape
        for own, loaded in stored.get(name, {}).items():
            state[own] = tensors[own].shape
            module, _, parameter = own.rpartition(".")
            before = layout.modules.get(name.rpartition(".")[0], OTHER)
            is_matrix = parameter == "weight" and len(state[own]) == 2 and (loaded.is_stacked or not loaded.pattern)
            modules[module] = LINEAR if is_matrix and before.orientation is None else before
    whole = {name: next(iter(own)) for name, own in stored.items() if not any(part.pattern for part in own.values())}
    stacks = {name: _stack(own, tensors) for name, own in stored.items() if name not in whole}
    return replace(layout, state=state, modules=modules, renamed=whole, stacks=stacks)


def _stack(stored: Mapping[str, _Loaded], tensors: Mapping[str, TensorInfo]) -> tuple[StackPart, ...]:
    """Where each matrix lies in the stack (experts, rows, columns) that loading makes; nothing if it is no stack."""
    parts = []
    for name, loaded in stored.items():
        numbers = EXPERT.findall(name.removeprefix(name.partition("experts")[0]))
        if not loaded.is_stacked or len(numbers) != 1 or len(tensors[name].shape) != 2:
            return ()
        before = [n for n, other in stored.items() if _expert_of(n) == numbers[0] and _is_before(other, loaded)]
        start = sum(tensors[n].shape[0] for n in before)
        parts.append(StackPart(name, int(numbers[0]), start, start + tensors[name].shape[0]))
    return tuple(parts)


def _expert_of(name: str) -> str:
    return "".join(EXPERT.findall(name.removeprefix(name.partition("experts")[0])))


def _is_before(other: _Loaded, loaded: _Loaded) -> bool:
    return loaded.parts.index(other.pattern or "") < loaded.parts.index(loaded.pattern or "")


def _transforms(model: Any) -> Sequence[Any]:
    """transformers' own conversions of this model, in their order; none in version 4."""
    try:
        mapping = import_module("transformers.conversion_mapping")
    except ImportError:
        return []
    return mapping.get_model_conversion_mapping(model)


def _load(name: str, transforms: Sequence[Any]) -> _Loaded:
    loaded = _Loaded(name)
    for transform in transforms:
        renamed, matched = transform.rename_source_key(loaded.name)
        loaded = replace(loaded, name=renamed)
        operations = [type(operation).__name__ for operation in getattr(transform, "operations", [])]
        if matched is not None and operations:
            is_stacked = all(operation in STACKING for operation in operations)
            loaded = _Loaded(renamed, tuple(transform.source_patterns), matched, is_stacked)
    return loaded
