"""What a merge will do, from headers alone: every tensor accounted for before a weight is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exporter.errors import InputRefused, UsageError
from exporter.merging.modules import OLD_BUFFERS, ModelLayout, Orientation, find_name, model_layout
from exporter.sources.adapter import Adapter, LoraFactors
from exporter.sources.checkpoint import Checkpoint
from exporter.sources.tensors import FLOATS, TensorInfo, item_size

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True, slots=True)
class WeightedFactors:
    """One adapter's factors for one matrix; `scale` includes the adapter's weight."""

    factors: LoraFactors
    scale: float
    orientation: Orientation


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """`name` as save_pretrained writes it, in `dtype`, from `source`, with nothing added or with `deltas`."""

    name: str
    dtype: str
    source: TensorInfo
    deltas: tuple[WeightedFactors, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def nbytes(self) -> int:
        return self.source.nbytes // item_size(self.source.dtype) * item_size(self.dtype)

    @property
    def is_copied(self) -> bool:
        """The output holds the source's very bytes."""
        return not self.deltas and self.dtype == self.source.dtype


@dataclass(frozen=True, slots=True)
class MergePlan:
    """`shards` in writing order; `dropped`: base tensors that are not written, with the reason."""

    base: Checkpoint
    adapters: tuple[tuple[Adapter, float], ...]
    shards: tuple[tuple[OutputTensor, ...], ...]
    tied: Mapping[str, str]
    dropped: Mapping[str, str]

    @property
    def tensors(self) -> tuple[OutputTensor, ...]:
        return tuple(tensor for shard in self.shards for tensor in shard)

    @property
    def changed(self) -> tuple[OutputTensor, ...]:
        return tuple(tensor for tensor in self.tensors if tensor.deltas)

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
    base: Checkpoint, adapters: Sequence[tuple[Adapter, float]], *, dtype: str = "auto", shard_size: int = 5_000_000_000
) -> MergePlan:
    """Match every adapter tensor to a base tensor and every base tensor to an output, or refuse by name."""
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}", expected="auto, " + ", ".join(DTYPES))
    if shard_size < 1:
        raise UsageError(f"--shard-size {shard_size}", expected="a positive number of bytes")
    check_full_precision(base.config, base)
    layout = model_layout(base.directory, base.config)
    sources, dropped = _match_base(base, layout)
    deltas = _match_adapters(adapters, layout, sources)
    tensors = []
    for name, source in sources.items():
        stored = DTYPES[dtype] if dtype != "auto" and source.dtype in FLOATS else source.dtype
        tensors.append(OutputTensor(name, stored, source, tuple(deltas.get(name, ()))))
    return MergePlan(base, tuple(adapters), split_shards(tensors, shard_size), layout.tied, dropped)


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
) -> dict[str, list[WeightedFactors]]:
    deltas: dict[str, list[WeightedFactors]] = {}
    for adapter, weight in adapters:
        matched = 0
        unmatched = []
        for factors in adapter.factors.values():
            module = find_name(factors.module, layout.orientation, layout.prefix)
            if module is None:
                unmatched.append(factors.module)
                continue
            matched += 1
            name = _target(module, factors, layout)
            orientation = layout.orientation[module]
            _check_shapes(adapter, factors, sources[name], orientation)
            deltas.setdefault(name, []).append(WeightedFactors(factors, factors.scale * weight, orientation))
        if unmatched:
            raise InputRefused(
                f"{'none' if not matched else len(adapter.factors) - matched} of the {len(adapter.factors)} modules in "
                f"{adapter.directory} {'match' if not matched else 'do not match'} the base: {unmatched[0]!r}"
                + (f" and {len(unmatched) - 1} more" if unmatched[1:] else ""),
                expected="names of Linear or Conv1D modules such as " + repr(next(iter(layout.orientation), "none")),
                todo="check that the adapter was trained on this base",
            )
        _check_every_target(adapter, layout)
    return deltas


def _target(module: str, factors: LoraFactors, layout: ModelLayout) -> str:
    """The stored weight that a module's factors change. A tied weight belongs to two modules: refused."""
    name = f"{module}.weight"
    if name in layout.tied or name in layout.tied.values():
        other = layout.tied.get(name) or next(alias for alias, stored in layout.tied.items() if stored == name)
        raise InputRefused(
            f"the adapter changes {factors.module!r}, whose weight is tied to {other!r}",
            expected="an adapter of matrices that are not shared: merging would change both",
            todo="untie the base first (tie_word_embeddings false, both weights stored)",
        )
    return name


def _check_shapes(adapter: Adapter, factors: LoraFactors, source: TensorInfo, orientation: Orientation) -> None:
    shape = (factors.up.shape[0], factors.down.shape[1])
    weight = source.shape if orientation == "out_in" else source.shape[::-1]
    if shape != weight:
        raise InputRefused(
            f"{factors.module} in {adapter.directory} changes a matrix of {shape[1]} inputs and {shape[0]} outputs",
            expected=f"{weight[1]} inputs and {weight[0]} outputs, as in the base's {source.name!r}",
            todo="this adapter was trained on another base; check base_model_name_or_path: "
            + repr(adapter.config.get("base_model_name_or_path")),
        )
    if source.dtype not in FLOATS:
        raise InputRefused(f"the base's {source.name!r} is {source.dtype}", expected="floats", todo="use the full base")


def _check_every_target(adapter: Adapter, layout: ModelLayout) -> None:
    """A list of target modules names what was trained: each such module of the model must have its factors."""
    targets, layers = adapter.config.get("target_modules"), adapter.config.get("layers_to_transform")
    if not isinstance(targets, list) or layers is not None or adapter.config.get("exclude_modules"):
        return
    present = {find_name(module, layout.orientation, layout.prefix) for module in adapter.factors}
    wanted = [m for m in layout.orientation if any(m == t or m.endswith(f".{t}") for t in targets)]
    missing = [module for module in wanted if module not in present]
    if missing:
        raise InputRefused(
            f"{adapter.directory} targets {', '.join(map(str, targets))} and has no factors for {missing[0]!r}"
            + (f" and {len(missing) - 1} more" if missing[1:] else ""),
            expected=f"factors for all {len(wanted)} modules of these names",
            todo="the adapter file is incomplete, or it was trained on a smaller base",
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
