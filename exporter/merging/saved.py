"""What an adapter stores whole: `modules_to_save`, trained biases, resized embeddings, and rows of trained tokens."""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from exporter.errors import InputRefused
from exporter.merging.changes import ReplaceRows
from exporter.merging.modules import ModelLayout, find_name
from exporter.sources.adapter import CONFIG, LORA, TRAINABLE_TOKENS, Adapter
from exporter.sources.tensors import FLOATS, TensorInfo, equal_bytes

TOKENS = re.compile(r"(?P<module>.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.[^.]+)?")
# `<module>.modules_to_save.<adapter>.weight`, `<module>.base_layer.weight`, `<module>.token_adapter.base_layer.weight`
INSERTED = re.compile(
    r"\.modules_to_save(?:\.(?!weight$|bias$)[^.]+(?=\.))?|\.token_adapter|\.base_layer|\.original_module"
)
# With bias="all", what modules_to_save replaced is stored once more, as the base had it.
UNUSED = ".original_module."


def token_rows(adapter: Adapter, layout: ModelLayout) -> tuple[dict[str, ReplaceRows], set[str]]:
    """Rows of trained tokens by the model's own name of a weight, and the adapter's tensors that hold them."""
    changes: dict[str, ReplaceRows] = {}
    consumed: set[str] = set()
    for name, info in adapter.tensors.items():
        match = TOKENS.fullmatch(name)
        if match is None:
            continue
        module = find_name(match["module"], layout.modules, layout.prefix)
        weight = f"{module}.weight"
        shape = layout.state.get(layout.tied.get(weight, weight))
        if module is None or shape is None:
            raise InputRefused(f"the adapter trains tokens of {match['module']!r}", expected="an embedding of the base")
        if weight in changes:
            raise InputRefused(f"the adapter trains tokens of {weight!r} twice", expected="once")
        rows = _rows(adapter.config, match["module"], adapter.method)
        if info.dtype not in FLOATS or info.shape != (len(rows), *shape[1:]):
            raise InputRefused(
                f"{name!r} is {info.dtype} {list(info.shape)}", expected=f"floats of shape {[len(rows), *shape[1:]]}"
            )
        changes[weight] = ReplaceRows(module, info, rows)
        consumed.add(name)
    _check_tokens(adapter, changes, layout)
    return _share_rows(changes, layout), consumed


def _check_tokens(adapter: Adapter, changes: Mapping[str, ReplaceRows], layout: ModelLayout) -> None:
    """Every module whose tokens were trained has them, but for what is tied to an input embedding of the same ones."""
    says = "trainable_token_indices"
    value = adapter.config.get(says)
    if value and not changes:
        _refuse_incomplete(adapter, "trained tokens", says)
    embedding = changes.get(f"{layout.input_embedding}.weight")
    for wanted, ids in value.items() if isinstance(value, dict) else ():
        if any(f".{change.module}".endswith(f".{wanted}") for change in changes.values()):
            continue
        is_tied = any(f".{alias}".endswith(f".{wanted}.weight") for alias in layout.tied)
        if not is_tied or embedding is None or embedding.rows != tuple(ids):
            _refuse_incomplete(adapter, f"trained tokens of {wanted!r}", says)


def _share_rows(changes: dict[str, ReplaceRows], layout: ModelLayout) -> dict[str, ReplaceRows]:
    """As PEFT ties them: tokens of an input embedding are those of its tied weights, unless these train others."""
    embedding = f"{layout.input_embedding}.weight"
    stored = layout.tied.get(embedding, embedding)
    tied = {stored, *(alias for alias, name in layout.tied.items() if name == stored)}
    group = [change for name, change in changes.items() if name in tied]
    if len(tied) == 1 or embedding not in changes or len({change.rows for change in group}) > 1:
        return changes
    first = changes[embedding]
    if not all(equal_bytes(first.values, change.values) for change in group):
        raise InputRefused(
            f"{first.values.file.name} holds two values for the trained tokens of {embedding!r} and its tied weights",
            expected="equal values: PEFT trains them as one",
            todo="save the adapter again",
        )
    others = {name: change for name, change in changes.items() if name not in tied}
    return {**others, stored: replace(first, is_shared=True)}


def _rows(config: Mapping[str, Any], module: str, method: str) -> tuple[int, ...]:
    """Token ids: a list for the input embedding, or a map from module names to lists."""
    key = "token_indices" if method == TRAINABLE_TOKENS else "trainable_token_indices"
    value = config.get(key)
    if isinstance(value, dict):
        value = next((ids for name, ids in value.items() if module == name or module.endswith(f".{name}")), None)
    if not isinstance(value, list) or not all(type(i) is int and i >= 0 for i in value) or len(set(value)) < len(value):
        raise InputRefused(f"{CONFIG} has {key} {str(config.get(key))[:80]!r}", expected=f"token ids of {module}, once")
    return tuple(value)


def replacements(adapter: Adapter, names: set[str], layout: ModelLayout) -> dict[str, TensorInfo]:
    """The adapter's tensors `names`, each of which takes the place of a tensor of the base, by the base's name."""
    found: dict[str, TensorInfo] = {}
    known = {**layout.state, **{alias: () for alias in layout.tied}}
    for name in sorted(names, key=lambda name: (UNUSED in name, name)):
        info = adapter.tensors[name]
        target = find_name(INSERTED.sub("", name), known, layout.prefix)
        if target is None:
            raise InputRefused(
                f"{adapter.file.name} holds {name!r}, which is neither a {adapter.method} factor nor a tensor of the "
                "base",
                expected="tensors named <module>.lora_A.weight and <module>.lora_B.weight, or saved modules",
                todo="check that the adapter was trained on this base",
            )
        if target in found and (UNUSED in name or equal_bytes(info, found[target])):
            continue
        if target in found:
            raise InputRefused(f"{adapter.file.name} holds {target!r} twice", expected="each tensor once")
        if info.dtype not in FLOATS:
            raise InputRefused(f"{name!r} is {info.dtype}", expected="floats")
        found[target] = info
    return found


def check_saved(
    adapter: Adapter, replaced: Mapping[str, TensorInfo], adapted: Collection[str], layout: ModelLayout
) -> None:
    """Everything that the configuration says was trained whole has its tensors. adapted: modules with factors."""
    saved = {
        wanted: [module for module in layout.modules if f".{module}".endswith(f".{wanted}")]
        for wanted in adapter.config.get("modules_to_save") or []
    }
    if saved and not any(saved.values()):  # for a classifier PEFT names all heads that some model might have
        raise InputRefused(f"{CONFIG} saves {', '.join(saved)}", expected="the name of a module of the base")
    for wanted, modules in saved.items():
        for module in modules:
            names = [name for name in (*layout.state, *layout.tied) if name.startswith(f"{module}.")]
            _require(names, adapter, replaced, layout, f"modules_to_save {wanted}")
    if adapter.method != LORA:
        return  # PEFT's own layers check the biases of other methods
    bias = adapter.config.get("bias")
    if bias == "all":
        _require([name for name in layout.state if "bias" in name], adapter, replaced, layout, "bias all")
    elif bias == "lora_only":
        names = [f"{module}.bias" for module in adapted if f"{module}.bias" in layout.state]
        _require(names, adapter, replaced, layout, "bias lora_only")


def _require(
    names: Collection[str], adapter: Adapter, replaced: Mapping[str, TensorInfo], layout: ModelLayout, says: str
) -> None:
    """A tied weight may stand under either of its names."""
    present = {layout.tied.get(name, name) for name in replaced}
    missing = [name for name in names if layout.tied.get(name, name) not in present]
    if missing:
        _refuse_incomplete(adapter, repr(missing[0]) + (f" and {len(missing) - 1} more" if missing[1:] else ""), says)


def _refuse_incomplete(adapter: Adapter, lacking: str, says: str) -> None:
    raise InputRefused(
        f"{adapter.file.name} holds no {lacking}",
        expected=f"what {CONFIG} says was trained: {says}",
        todo="the adapter file is incomplete: save it again",
    )
