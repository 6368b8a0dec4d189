"""What a merge will do, from headers alone: every tensor accounted for before a weight is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from exporter.errors import InputRefused, UsageError
from exporter.merging.asked import Asked, match_adapters
from exporter.merging.changes import OntoInt8
from exporter.merging.int8 import quantized_modules
from exporter.merging.modules import OLD_BUFFERS, ModelLayout, find_name, model_layout
from exporter.merging.output import OutputTensor, check_output
from exporter.merging.stored_names import as_stored
from exporter.merging.tying import embedding_names, new_vocabulary, untie
from exporter.sources.adapter import Adapter
from exporter.sources.checkpoint import Checkpoint
from exporter.sources.tensors import FLOATS, TensorInfo, item_size

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
Onto = Literal["original", "int8"]


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
    asked = match_adapters(adapters, layout, sources)
    layout, untied = untie(base, layout, asked)
    sources |= {alias: sources[stored] for alias, stored in untied.items()}
    dropped = {name: why for name, why in dropped.items() if find_name(name, untied, layout.prefix) is None}
    vocab_size = new_vocabulary(base, layout, asked)
    codes = set(quantized_modules(layout.model)) if onto == "int8" else set()
    tensors = []
    for name in layout.state:
        tensor = _output(name, sources[name], asked.get(name, Asked()), dtype)
        module, _, parameter = name.rpartition(".")
        if parameter == "weight" and module in codes and tensor.source is tensor.base:
            tensor = replace(tensor, onto=OntoInt8(layout.matrices[module]))
        check_output(tensor, layout.state[name], resized=vocab_size is not None and name in embedding_names(layout))
        tensors.append(tensor)
    return MergePlan(
        base, tuple(adapters), split_shards(tensors, shard_size), layout, dropped, tuple(sorted(untied)), vocab_size
    )


def _output(name: str, base: TensorInfo, asked: Asked, dtype: str) -> OutputTensor:
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
