"""Adapters of the methods that PEFT's own layers merge, one module at a time: see `peft_layer` for which."""

import copy
from collections.abc import Mapping
from threading import Lock

import torch

from exporter.errors import InputRefused
from exporter.merging.changes import Change, PeftLayer
from exporter.merging.delta import Update, read_factor
from exporter.merging.modules import ModelLayout, find_name
from exporter.sources.adapter import Adapter
from exporter.sources.tensors import FLOATS, TensorInfo
from exporter.sources.values import read_tensor

ONE_AT_A_TIME = Lock()  # PEFT's layers are merged with settings of the whole process, and take the memory of a module


def peft_changes(
    adapter: Adapter, layout: ModelLayout, sources: Mapping[str, TensorInfo]
) -> tuple[dict[str, list[Change]], set[str]]:
    """Changes by the name of the stored tensor, and the names of the adapter's tensors that they consume.

    A method may change a module's bias too, which only its arithmetic tells: every parameter of a module is computed.
    """
    from exporter.merging.peft_layer import split_names, targeted_modules  # PEFT takes a second to import

    split = split_names(adapter.tensors, adapter.method)
    shared = {name: adapter.tensors[name] for name in split.shared}
    targeted = targeted_modules(adapter.config, layout.model)
    # Uni-LoRA may store one vector for the whole model and no name of a module.
    modules = split.modules or {module: [] for module in targeted if shared}
    changes: dict[str, list[Change]] = {}
    present = set()
    for given, names in modules.items():
        module = find_name(given, layout.modules, layout.prefix)
        if module is None:
            raise InputRefused(
                f"the adapter changes {given!r}, which the base does not have",
                expected="names of the base's modules such as " + repr(next(iter(layout.matrices), "none")),
                todo="check that the adapter was trained on this base",
            )
        present.add(module)
        own = {module + name.removeprefix(given): adapter.tensors[name] for name in names}
        parameters = {
            parameter: sources[name]
            for parameter in layout.modules[module].parameters
            if (name := _stored(f"{module}.{parameter}", layout)) in sources
        }
        for parameter in parameters:
            change = PeftLayer(module, parameter, adapter.method, adapter.config, own | shared, parameters)
            changes.setdefault(f"{module}.{parameter}", []).append(change)
    missing = [module for module in targeted if module not in present]
    if missing:
        raise InputRefused(
            f"{adapter.file.name} has no tensors for {missing[0]!r}"
            + (f" and {len(missing) - 1} more" if missing[1:] else ""),
            expected="tensors for every module that the configuration targets",
            todo="the adapter file is incomplete, or it was trained on a smaller base",
        )
    return changes, {name for names in split.modules.values() for name in names} | set(shared)


def _stored(name: str, layout: ModelLayout) -> str:
    return layout.tied.get(name, name)


def prepare_peft(change: PeftLayer, layout: ModelLayout) -> Update:
    """The update of a whole parameter: PEFT's layer with the base's values in it, merged in float32."""
    from exporter.merging.peft_layer import merge_module

    tensors = {
        name: read_factor(info) if info.dtype in FLOATS else read_tensor(info) for name, info in change.tensors.items()
    }

    def update(rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        layer = copy.deepcopy(layout.model.get_submodule(change.module)).to_empty(device="cpu").float()
        for parameter, info in change.parameters.items():
            value = rows.float() if parameter == change.parameter else read_tensor(info).float()
            getattr(layer, parameter).data = value.reshape(info.shape).clone()
        with ONE_AT_A_TIME:
            merged = merge_module(
                config=change.config, name=change.module, layer=layer, model=layout.model, tensors=tensors
            )
        return merged[change.parameter].reshape(rows.shape).to(rows.dtype) if change.parameter in merged else rows

    return update
