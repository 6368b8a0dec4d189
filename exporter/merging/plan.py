"""What a merge will do, from headers alone: every tensor accounted for before a weight is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from exporter.errors import InputRefused, UsageError
from exporter.merging.changes import AddVector, Change, LowRank, OntoInt8, ReplaceRows, WeightDecomposed
from exporter.merging.int8 import quantized_modules
from exporter.merging.lora import lora_changes
from exporter.merging.modules import OLD_BUFFERS, ModelLayout, find_name, model_layout
from exporter.merging.saved import check_saved, replacements, token_rows
from exporter.merging.stored_names import as_stored
from exporter.merging.tuners import peft_changes
from exporter.sources.adapter import LORA, TRAINABLE_TOKENS, Adapter
from exporter.sources.checkpoint import Checkpoint
from exporter.sources.tensors import FLOATS, TensorInfo, equal_bytes, item_size

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
Onto = Literal["original", "int8"]


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """`name` as save_pretrained writes it, in `dtype`: the values of `source`, then `onto`, then `changes` in order.

    source: the base's tensor, or the adapter's where it replaces the base's. base: the base's tensor.
    """

    name: str
    dtype: str
    source: TensorInfo
    base: TensorInfo
    changes: tuple[Change, ...] = ()
    onto: OntoInt8 | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def nbytes(self) -> int:
        return self.source.nbytes // item_size(self.source.dtype) * item_size(self.dtype)

    @property
    def is_copied(self) -> bool:
        """The output holds the source's very bytes."""
        return not self.changes and self.onto is None and self.dtype == self.source.dtype

    @property
    def is_changed(self) -> bool:
        """An adapter says something of this tensor."""
        return bool(self.changes) or self.source is not self.base


@dataclass(frozen=True, slots=True)
class MergePlan:
    """`shards` in writing order; `dropped`: base tensors that are not written, with the reason.

    untied: names of weights that were one in the base and are two in the output. vocab_size: where it changes.
    """

    base: Checkpoint
    adapters: tuple[tuple[Adapter, float], ...]
    shards: tuple[tuple[OutputTensor, ...], ...]
    layout: ModelLayout
    dropped: Mapping[str, str]
    untied: tuple[str, ...] = ()
    vocab_size: int | None = None

    @property
    def tied(self) -> Mapping[str, str]:
        return self.layout.tied

    @property
    def tensors(self) -> tuple[OutputTensor, ...]:
        return tuple(tensor for shard in self.shards for tensor in shard)

    @property
    def changed(self) -> tuple[OutputTensor, ...]:
        return tuple(tensor for tensor in self.tensors if tensor.is_changed)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def parameters(self) -> int:
        return sum(tensor.nbytes // item_size(tensor.dtype) for tensor in self.tensors)

    @property
    def config_dtype(self) -> str:
        """What `torch_dtype` says of the output: the type of most of its bytes."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
        names = {code: name for name, code in DTYPES.items()}
        return names.get(max(sizes, key=sizes.__getitem__), "float32")


def plan_merge(
    base: Checkpoint,
    adapters: Sequence[tuple[Adapter, float]],
    *,
    dtype: str = "auto",
    shard_size: int = 5_000_000_000,
    onto: Onto = "original",
) -> MergePlan:
    """Match every adapter tensor to a base tensor and every base tensor to an output, or refuse by name.

    An adapter that changes one of two tied weights unties them: that is what its unmerged model computes.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}", expected="auto, " + ", ".join(DTYPES))
    if shard_size < 1:
        raise UsageError(f"--shard-size {shard_size}", expected="a positive number of bytes")
    if onto not in ("original", "int8"):
        raise UsageError(f"--onto {onto}", expected="original or int8")
    check_full_precision(base.config, base)
    layout = as_stored(model_layout(base.directory, base.config), base.tensors)
    sources, dropped = _match_base(base, layout)
    asked = _match_adapters(adapters, layout, sources)
    layout, untied = _untie(base, layout, asked)
    sources |= {alias: sources[stored] for alias, stored in untied.items()}
    dropped = {name: why for name, why in dropped.items() if find_name(name, untied, layout.prefix) is None}
    vocab_size = _new_vocabulary(base, layout, asked)
    codes = set(quantized_modules(layout.model)) if onto == "int8" else set()
    tensors = []
    for name in layout.state:
        tensor = _output(name, sources[name], asked.get(name, _Asked()), dtype)
        module, _, parameter = name.rpartition(".")
        if parameter == "weight" and module in codes and tensor.source is tensor.base:
            tensor = replace(tensor, onto=OntoInt8(layout.matrices[module]))
        _check_output(tensor, layout.state[name], resized=vocab_size is not None and name in embedding_names(layout))
        tensors.append(tensor)
    return MergePlan(
        base, tuple(adapters), split_shards(tensors, shard_size), layout, dropped, tuple(sorted(untied)), vocab_size
    )


@dataclass(slots=True)
class _Asked:
    """What the adapters ask of one tensor."""

    changes: tuple[Change, ...] = ()
    replacement: TensorInfo | None = None

    @property
    def is_shared(self) -> bool:
        """Its changes are those of the tied weights too."""
        return all(isinstance(change, ReplaceRows) and change.is_shared for change in self.changes)

    @property
    def only_shared_rows(self) -> bool:
        return self.replacement is None and self.is_shared


def _output(name: str, base: TensorInfo, asked: _Asked, dtype: str) -> OutputTensor:
    stored = DTYPES[dtype] if dtype != "auto" and base.dtype in FLOATS else base.dtype
    return OutputTensor(name, stored, asked.replacement or base, base, asked.changes)


def check_full_precision(config: Mapping[str, Any], base: Checkpoint) -> None:
    """A merge adds to full-precision weights; codes of a quantized base are not weights."""
    method = config.get("quantization_config")
    if method:
        name = method.get("quant_method", "an unknown method") if isinstance(method, dict) else method
        raise InputRefused(
            f"the base {base.directory} is quantized ({name})",
            expected="full-precision weights (float32, float16 or bfloat16)",
            todo="use the checkpoint that the quantized one was made from",
        )


def _match_base(base: Checkpoint, layout: ModelLayout) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Sources by output name in state-dict order, and what is dropped. Every base tensor is in one of the two."""
    found: dict[str, TensorInfo] = {}
    dropped: dict[str, str] = {}
    for name, info in base.tensors.items():
        known = find_name(name, layout.state, layout.prefix)
        if known is not None and known in found:
            raise InputRefused(f"{name!r} and {found[known].name!r} are both {known!r}", expected="each tensor once")
        if known is not None:
            found[known] = info
        elif (alias := find_name(name, layout.tied, layout.prefix)) is not None:
            dropped[name] = f"tied to {layout.tied[alias]}"
        elif OLD_BUFFERS.fullmatch(name):
            dropped[name] = "a buffer that the model computes"
        else:
            raise InputRefused(
                f"the base holds {name!r}, which its architecture does not have",
                expected=f"the {len(layout.state)} tensors of {base.config.get('architectures')}",
                todo="check that config.json and the weights belong together",
            )
    for alias, name in layout.tied.items():
        # An old file may store a tied pair under the alias alone.
        if name not in found and (info := base.tensors.get(alias)) is not None:
            found[name] = info
            dropped.pop(alias)
    missing = [name for name in layout.state if name not in found]
    if missing:
        raise InputRefused(
            f"the base has no tensor for {missing[0]!r}" + (f" and {len(missing) - 1} more" if missing[1:] else ""),
            expected="every tensor of its architecture",
            todo="check that all shards are there and that config.json belongs to them",
        )
    for name, shape in layout.state.items():
        if found[name].shape != shape:
            raise InputRefused(
                f"the base's {found[name].name!r} has shape {list(found[name].shape)}",
                expected=f"{list(shape)}, as config.json says",
            )
    return {name: found[name] for name in layout.state}, dropped


def _match_adapters(
    adapters: Sequence[tuple[Adapter, float]], layout: ModelLayout, sources: Mapping[str, TensorInfo]
) -> dict[str, _Asked]:
    """What is asked of each tensor, by the model's own name of it: an alias of a tied weight keeps its name here."""
    asked: dict[str, _Asked] = {}
    for adapter, weight in adapters:
        changes, replaced = _read_adapter(adapter, weight, layout, sources)
        for name, info in replaced.items():
            entry = asked.setdefault(name, _Asked())
            if weight != 1 or entry.replacement is not None:
                raise InputRefused(
                    f"{name!r} in {adapter.directory} replaces the base's with weight {weight:g}, or for a second time",
                    expected="one adapter with weight 1 for modules_to_save, biases and embeddings: they are no sums",
                )
            entry.replacement = info
        for name, more in changes.items():
            entry = asked.setdefault(name, _Asked())
            entry.changes = (*entry.changes, *more)
            if len(entry.changes) > 1 and not all(isinstance(change, LowRank) for change in entry.changes):
                raise InputRefused(
                    f"{name!r} is changed {len(entry.changes)} times, and not by plain LoRA alone",
                    expected="sums of LoRA: other methods do not add up",
                )
    return asked


def _read_adapter(
    adapter: Adapter, weight: float, layout: ModelLayout, sources: Mapping[str, TensorInfo]
) -> tuple[dict[str, list[Change]], dict[str, TensorInfo]]:
    """Every tensor of the adapter is consumed by one of its parts, or it is refused by name."""
    changes: dict[str, list[Change]] = {}
    consumed: set[str] = set()
    if adapter.method == LORA:
        changes, consumed = lora_changes(adapter, weight, layout, sources)
    elif adapter.method != TRAINABLE_TOKENS:
        if weight != 1:
            raise InputRefused(
                f"the weight {weight:g} for {adapter.directory}, a {adapter.method} adapter",
                expected="weight 1: only LoRA can be weighted",
            )
        changes, consumed = peft_changes(adapter, layout, sources)
    adapted = {name.rpartition(".")[0] for name in changes}
    rows, row_names = token_rows(adapter, layout)
    for name, change in rows.items():
        if weight != 1:
            raise InputRefused(f"the weight {weight:g} for trained tokens of {name!r}", expected="weight 1")
        changes.setdefault(name, []).append(change)
    replaced = replacements(adapter, set(adapter.tensors) - consumed - row_names, layout)
    check_saved(adapter, replaced, adapted, layout)
    if not changes and not replaced:
        raise InputRefused(f"{adapter.directory} changes no tensor of the base", expected="an adapter for this base")
    return changes, replaced


def _untie(base: Checkpoint, layout: ModelLayout, asked: dict[str, _Asked]) -> tuple[ModelLayout, dict[str, str]]:
    """The layout of the output, and the aliases that become weights of their own, with what they were tied to.

    Trained tokens change both of a pair: PEFT ties them. Where both were saved whole with equal bytes they stay tied.
    """
    together = _join_equal(layout, asked)
    pairs = {**layout.tied, **{stored: alias for alias, stored in layout.tied.items()}}
    split = [n for n, entry in asked.items() if n in pairs and n not in together and not entry.only_shared_rows]
    if not split:
        return layout, {}
    shared = [n for n, entry in asked.items() if n in pairs and entry.only_shared_rows]
    if shared:
        raise InputRefused(
            f"tokens of {shared[0]!r} are trained, and {split[0]!r}, which is tied to it, is changed otherwise",
            expected="one or the other: trained tokens are those of both",
        )
    name = split[0]
    loose = layout
    if not base.config.get("is_encoder_decoder"):  # T5 scales its output only if the embeddings are tied
        loose = as_stored(model_layout(base.directory, base.config, untied=True), base.tensors)
    if any(n in loose.tied or n in loose.tied.values() for n in split):
        raise InputRefused(
            f"the adapter changes {name!r}, whose weight is tied to {pairs[name]!r}",
            expected="an architecture whose tied weights can be separated by tie_word_embeddings false",
            todo="merging would change both: train an adapter without it",
        )
    return loose, {alias: stored for alias, stored in layout.tied.items() if alias not in loose.tied}


def _join_equal(layout: ModelLayout, asked: dict[str, _Asked]) -> set[str]:
    """Names of tied weights that one replacement serves: both halves were saved with equal bytes, or one half of a
    resized pair was saved, for PEFT saves embeddings of its own accord where they were resized. Trained tokens of both
    come on top.
    """
    together = set()
    for alias, stored in layout.tied.items():
        halves = [asked[name] for name in (alias, stored) if name in asked]
        values = [half.replacement for half in halves if half.replacement]
        if not values or not all(half.is_shared for half in halves):
            continue
        if len(values) == 2 and not equal_bytes(values[0], values[1]):
            continue
        if len(values) == 1 and values[0].shape == layout.state[stored]:
            continue
        asked[stored] = _Asked(tuple(change for half in halves for change in half.changes), values[-1])
        asked.pop(alias, None)
        together.add(stored)
    return together


def _new_vocabulary(base: Checkpoint, layout: ModelLayout, asked: Mapping[str, _Asked]) -> int | None:
    """The rows of replaced embeddings where they differ from the base's: config.json follows them."""
    rows = {}
    for name in embedding_names(layout):
        replacement = asked[name].replacement if name in asked else None
        shape = replacement.shape if replacement else layout.state.get(name, ())
        if shape:
            rows[name] = shape[0]
    if len(set(rows.values())) > 1:
        text = ", ".join(f"{name} {count}" for name, count in sorted(rows.items()))
        raise InputRefused(
            f"the embeddings of the output would have different numbers of rows: {text}",
            expected="one vocabulary: the adapter replaces both embeddings or none",
            todo="save the adapter again with modules_to_save for both, or save_embedding_layers=True",
        )
    count = next(iter(rows.values()), None)
    unchanged = all(layout.state[name][0] == count for name in rows)
    return None if unchanged else count


def embedding_names(layout: ModelLayout) -> set[str]:
    """The stored weights of the input and output embeddings: one where they are tied."""
    modules = [module for module in (layout.input_embedding, layout.output_embedding) if module is not None]
    return {layout.tied.get(f"{module}.weight", f"{module}.weight") for module in modules}


def _check_output(tensor: OutputTensor, shape: tuple[int, ...], *, resized: bool) -> None:
    """The shapes of what is put in or added, against what config.json says and the tensor has."""
    if tensor.source.shape != shape and not (resized and tensor.source.shape[1:] == shape[1:]):
        raise InputRefused(
            f"{tensor.source.name!r} has shape {list(tensor.source.shape)}",
            expected=f"{list(shape)}, as in the base",
            todo="check that the adapter was trained on this base",
        )
    if tensor.is_changed and tensor.base.dtype not in FLOATS:
        raise InputRefused(f"the base's {tensor.base.name!r} is {tensor.base.dtype}", expected="floats")
    for change in tensor.changes:
        match change:
            case LowRank():
                _check_factors(change, tensor)
            case WeightDecomposed():
                _check_factors(change.low_rank, tensor)
                outputs = change.low_rank.up.shape[0]
                _check_shape(change.magnitude, [(outputs,), (1, outputs), (outputs, 1)])
            case AddVector():
                _check_shape(change.vector, [tensor.shape])
            case ReplaceRows() if max(change.rows, default=0) >= tensor.shape[0]:
                raise InputRefused(
                    f"the adapter trains the token {max(change.rows)}", expected=f"ids below {tensor.shape[0]}"
                )


def _check_shape(info: TensorInfo, allowed: list[tuple[int, ...]]) -> None:
    if info.shape not in allowed:
        raise InputRefused(
            f"the adapter's {info.name!r} has shape {list(info.shape)}", expected=f"{list(allowed[0])}, as in the base"
        )


def _check_factors(change: LowRank, tensor: OutputTensor) -> None:
    outputs, inputs = change.up.shape[0], change.down.shape[1]
    if change.part is not None:
        outputs = change.part.stop - change.part.start
    weight = tensor.shape[-2:] if change.orientation == "out_in" else tensor.shape[-2:][::-1]
    if (outputs, inputs) != weight:
        raise InputRefused(
            f"{change.module}: the adapter changes a matrix of {inputs} inputs and {outputs} outputs",
            expected=f"{weight[1]} inputs and {weight[0]} outputs, as in the base's {tensor.base.name!r}",
            todo="this adapter was trained on another base; check base_model_name_or_path",
        )


def split_shards(tensors: list[OutputTensor], limit: int) -> tuple[tuple[OutputTensor, ...], ...]:
    """Greedily in state-dict order, as save_pretrained does; a tensor larger than `limit` has a shard of its own."""
    shards: list[list[OutputTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return tuple(map(tuple, shards))
