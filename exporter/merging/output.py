"""One tensor of the output: where its values come from, what is done to them, and whether that fits."""

from dataclasses import dataclass

from exporter.errors import InputRefused
from exporter.merging.changes import AddVector, Change, LowRank, OntoInt8, ReplaceRows, WeightDecomposed
from exporter.sources.tensors import FLOATS, TensorInfo, item_size


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


def check_output(tensor: OutputTensor, shape: tuple[int, ...], *, resized: bool) -> None:
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
