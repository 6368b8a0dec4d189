"""The arithmetic of a merge: pure functions on blocks of rows, one per adapter method.

In float32 they give the bits of PEFT's own merge: the same operations in the same order. In float64 they are what the
proof compares with. Blocks of rows are multiples of ROW_BLOCK: smaller ones change the order of float32 sums.
"""

from collections.abc import Callable

import torch

from exporter.errors import InputRefused
from exporter.merging import int8
from exporter.merging.changes import (
    AddVector,
    Change,
    LowRank,
    OntoInt8,
    Orientation,
    PeftLayer,
    ReplaceRows,
    WeightDecomposed,
)
from exporter.sources.tensors import TensorInfo
from exporter.sources.values import read_columns, read_rows, read_tensor

ROW_BLOCK = 64
# Values in the widest temporary: 2 MB in float32, so that a block's arithmetic stays in the processor's cache.
BLOCK_ELEMENTS = 1 << 19

# update(rows, start, stop): what rows `start` to `stop` become. `rows` stays as it is.
Update = Callable[[torch.Tensor, int, int], torch.Tensor]


def lora_delta(down: torch.Tensor, up: torch.Tensor, scale: float, orientation: Orientation) -> torch.Tensor:
    """scale * B A (Hu et al., LoRA, 2021, section 4.1), laid out as the weight it is added to.

    down A (r, in) and up B (out, r). Returns (out, in) for "out_in" (Linear), (in, out) for "in_out" (Conv1D).
    """
    if orientation == "out_in":
        return (up @ down).mul_(scale)
    if up.shape[0] < ROW_BLOCK:
        return (up @ down).T * scale
    # The bits of (B A)^T, and rows that lie in memory as the weight's do: adding them is many times faster.
    return (down.T @ up.T).mul_(scale)


def lora_delta_rows(
    down: torch.Tensor, up: torch.Tensor, scale: float, orientation: Orientation, start: int, stop: int
) -> torch.Tensor:
    """Rows `start` to `stop` of `lora_delta`; `start` is a multiple of ROW_BLOCK."""
    if orientation == "in_out":
        return lora_delta(down[:, start:stop], up, scale, orientation)
    return lora_delta(down, up[start:stop], scale, orientation)


def row_blocks(rows: int, columns: int, *, group: int, whole: bool, elements: int) -> list[tuple[int, int]]:
    """Ranges of rows of about `elements` values: multiples of ROW_BLOCK rows, but the last of a group takes the rest.

    A matrix product gives its last rows to other instructions, so none of them may be cut off from the rows before.
    group: rows of one matrix of a stack, which no range crosses. whole: one range.
    """
    if whole or not rows:
        return [(0, rows)] if rows else []
    step = max(ROW_BLOCK, elements // max(1, columns) // ROW_BLOCK * ROW_BLOCK)
    blocks = []
    for first in range(0, rows, group):
        starts = list(range(first, first + group, step))
        if len(starts) > 1 and first + group - starts[-1] < ROW_BLOCK:
            starts.pop()
        blocks += zip(starts, [*starts[1:], first + group], strict=True)
    return blocks


def prepare(
    change: Change,
    source: TensorInfo,
    onto: OntoInt8 | None,
    dtype: torch.dtype,
    elements: int = BLOCK_ELEMENTS,
) -> Update:
    """The update of one change with its factors in `dtype`. Reads the adapter, and for some methods the weight once.

    source, onto: the weight that is changed. InputRefused where a factor is not finite.
    """
    match change:
        case LowRank():
            return _low_rank(change, dtype)
        case WeightDecomposed():
            return _weight_decomposed(change, source, onto, dtype, elements)
        case AddVector():
            vector = read_factor(change.vector, dtype)
            return lambda rows, start, stop: rows + vector[start:stop] * change.scale
        case ReplaceRows():
            return _replace_rows(change, dtype)
        case PeftLayer():
            raise TypeError("a PeftLayer is prepared by exporter.merging.tuners")


def _low_rank(change: LowRank, dtype: torch.dtype) -> Update:
    down, up = read_factors(change, dtype)
    if change.experts == 1:
        return lambda rows, start, stop: lora_delta_rows(down, up, change.scale, change.orientation, start, stop).add_(
            rows
        )
    # A (experts * r, in), B (out, r * experts): PEFT's ParamWrapper.get_delta_weight
    downs = down.reshape(change.experts, -1, down.shape[-1])  # (E, r, in)
    ups = up.reshape(up.shape[0], -1, change.experts).permute(2, 0, 1).contiguous()  # (E, out, r)
    if change.part is not None:
        own_down, own_up = downs[change.part.expert], ups[change.part.expert, change.part.start : change.part.stop]
        return lambda rows, start, stop: lora_delta_rows(
            own_down, own_up, change.scale, change.orientation, start, stop
        ).add_(rows)
    per_expert = downs.shape[2] if change.orientation == "in_out" else ups.shape[1]

    def update(rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        expert, first = divmod(start, per_expert)
        last = first + stop - start
        return lora_delta_rows(downs[expert], ups[expert], change.scale, change.orientation, first, last).add_(rows)

    return update


def _weight_decomposed(
    change: WeightDecomposed, source: TensorInfo, onto: OntoInt8 | None, dtype: torch.dtype, elements: int
) -> Update:
    """Liu et al., DoRA (2024), equation 5: m V / ||V||, one norm for each output."""
    low = change.low_rank
    down, up = read_factors(low, dtype)
    magnitude = read_factor(change.magnitude, dtype).reshape(-1)  # (out,)
    if low.orientation == "out_in":

        def update_rows(rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
            total = lora_delta_rows(down, up, low.scale, low.orientation, start, stop).add_(rows)
            return (magnitude[start:stop] / torch.linalg.norm(total, dim=1)).view(-1, 1) * total

        return update_rows

    norms = []
    columns = source.shape[1]
    for start, stop in row_blocks(columns, source.rows, group=columns, whole=False, elements=elements):
        block = read_columns(source, start, stop)  # (in, columns of the block)
        if onto is not None:
            scales = int8.absmax_block(block, "in_out")
            block = int8.dequantize(int8.codes(block, scales, "in_out"), scales, "in_out")
        block = block.to(dtype)
        delta = lora_delta(down, up[start:stop], low.scale, "in_out")
        norms.append(torch.linalg.norm(block.T + delta.T, dim=1))
    factor = (magnitude / torch.cat(norms)).view(1, -1)

    def update(rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        return factor * lora_delta_rows(down, up, low.scale, low.orientation, start, stop).add_(rows)

    return update


def _replace_rows(change: ReplaceRows, dtype: torch.dtype) -> Update:
    values = read_factor(change.values, dtype)
    ids = torch.tensor(change.rows, dtype=torch.long)

    def update(rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        here = (ids >= start) & (ids < stop)
        return rows.index_copy(0, ids[here] - start, values[here])

    return update


def prepare_int8(onto: OntoInt8, source: TensorInfo, elements: int = BLOCK_ELEMENTS) -> Update:
    """What the weight's bitsandbytes codes mean, in float32. A Conv1D's scales need one pass over the weight."""
    absmax: torch.Tensor | None = None
    if onto.orientation == "in_out":
        blocks = row_blocks(source.rows, source.shape[1], group=source.rows, whole=False, elements=elements)
        for start, stop in blocks:
            absmax = int8.absmax_block(read_rows(source, start, stop), "in_out", absmax)

    def update(rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        scales = int8.absmax_block(rows, "out_in") if absmax is None else absmax
        try:
            codes = int8.codes(rows, scales, onto.orientation)
        except ValueError as error:
            raise InputRefused(
                f"the base's {source.name!r} has no int8 codes: {error}", expected="weights that float16 can hold"
            ) from error
        return int8.dequantize(codes, scales, onto.orientation)

    return update


def read_factor(info: TensorInfo, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """An adapter's tensor in `dtype`; InputRefused where it holds a value that is not finite."""
    factor = read_tensor(info).to(dtype)
    if not torch.isfinite(factor).all():
        raise InputRefused(f"the adapter's {info.name!r} holds NaN or infinity", expected="finite factors")
    return factor


def read_factors(change: LowRank, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in) and B (out, r)."""
    return read_factor(change.down, dtype), read_factor(change.up, dtype)
