"""The names that a checkpoint's files use, where the installed transformers calls the model's tensors otherwise.

transformers 5 renames tensors and stacks experts as it loads, and undoes both as it saves: the files stay as version 4
wrote them. A merge works on files, so the layout is brought into their names here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

from exporter.merging.modules import ModelLayout, ModuleInfo, find_name
from exporter.sources.tensors import TensorInfo

# A matrix that loading puts into a stack or a router of its own: in version 4 each was the weight of a Linear.
STACKED = ModuleInfo("out_in", ("weight",), is_convolution=False, is_transposed=False)


def as_stored(layout: ModelLayout, tensors: Mapping[str, TensorInfo]) -> ModelLayout:
    """`layout` with the names of `tensors` in place of those that loading would give them; else as it is."""
    unknown = [name for name in tensors if find_name(name, layout.state, layout.prefix) is None]
    transforms = _transforms(layout.model) if unknown else []
    if not transforms:
        return layout
    stored: dict[str, list[str]] = {}
    for name in unknown:
        target, fused = _rename(name, transforms)
        known = find_name(target, layout.state, layout.prefix)
        if known is not None and (fused or tensors[name].shape == layout.state[known]):
            stored.setdefault(known, []).append(name)
    state: dict[str, tuple[int, ...]] = {}
    modules = dict(layout.modules)
    for name, shape in layout.state.items():
        for own in stored.get(name, [name]):
            state[own] = tensors[own].shape if own != name else shape
            if own != name:
                module, _, parameter = own.rpartition(".")
                before = modules.get(name.rpartition(".")[0])
                is_matrix = parameter == "weight" and len(state[own]) == 2
                modules[module] = STACKED if before is None or (is_matrix and not before.orientation) else before
    renamed = {name: own[0] for name, own in stored.items() if own[0] in state and len(own) == 1}
    return replace(layout, state=state, modules=modules, renamed=renamed)


def _transforms(model: Any) -> list[Any]:
    """transformers' own conversions of this model, in their order; none in version 4."""
    try:
        mapping = import_module("transformers.conversion_mapping")
    except ImportError:
        return []
    return mapping.get_model_conversion_mapping(model)


def _rename(name: str, transforms: Iterable[Any]) -> tuple[str, bool]:
    """The name that loading gives a stored tensor, and whether it becomes a part of a larger one."""
    fused = False
    for transform in transforms:
        name, matched = transform.rename_source_key(name)
        fused = fused or (matched is not None and hasattr(transform, "operations"))
    return name, fused
