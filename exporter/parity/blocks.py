"""A transformers model run block by block, one block's weights in memory at a time: for models larger than memory.

    model = BlockModel(spec)                  # T, M32, B or F: see blocks_specs.py
    x = model.embed(tokens)                   # (T, E) float32: what the first block is given
    x = model.run(0, tokens, x)               # (T, E): what block 0 makes of it; loads block 0 and drops any other
    logits = model.logits(tokens, x)          # (T, V) float32: final norm and head

Whoever compares layers calls `run(i, ...)` of two models on the same input (local error), or of each on its own
(accumulated error); then two blocks are in memory. Loading a block costs more than running it on a short text: loop
over blocks outside and over documents inside. `HiddenStates` in blocks_states.py keeps what lies between on disk.

The oracle stays transformers' own forward, and PEFT's own layers. The whole model is built without weights (meta
device); embeddings, final norm and head are filled in, and one block. A call runs the model's real forward, whose
blocks let the hidden state pass, but for the one that is asked for: there the real block is called, with the masks,
position embeddings and whatever else the model gives it. So nothing here knows an architecture.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from exporter.errors import InputRefused
from exporter.parity.attention import attention_of
from exporter.parity.bases import BaseOptions, meta_model, quiet
from exporter.parity.forward import forward
from exporter.parity.int8_base import int8_modules, int8_values

Float32 = NDArray[np.float32]
# A tensor as it is stored, by its name in the checkpoint; None where there is none.
Values = Callable[[str], torch.Tensor | None]


class Unsupported(Exception):
    """Says why a model cannot be run block by block. Whoever meets it loads the whole model."""


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """config.json in `directory` names the architecture, `values` are its weights, `options` as in `load_base`.

    attach puts adapters on the base and gives the model that is then called; merge makes plain modules of adapted
    ones. Both see a model in which only one part holds weights. None for a model without adapters, or left unmerged.
    """

    directory: Path
    values: Values
    options: BaseOptions
    attach: Callable[[Any], Any] | None = None
    merge: Callable[[Any], Any] | None = None


class BlockModel:
    """One model as its embeddings, its blocks and its head. A CPU gives the whole model's logits, bit for bit.

    Raises Unsupported where the architecture has no single list of decoder blocks, InputRefused for a missing weight.
    """

    def __init__(self, spec: BlockSpec) -> None:
        self._spec = spec
        self._skeleton = without_weights(spec.directory, torch.float32, spec.options.rows)
        self._path = _blocks_path(self._skeleton)
        self._aliases = _aliases(self._skeleton)
        self._embeddings = _embedding_weights(self._skeleton)
        self._int8 = int8_modules(meta_model(spec.directory)) if spec.options.onto == "int8" else {}
        self._stem: Any = None  # the model that is called: all but its blocks hold weights
        self._block: Any = None
        self._loaded: int | None = None
        self._entries: int | None = None  # of the tuple that blocks return, 0 for a bare tensor; None: not known yet

    @property
    def depth(self) -> int:
        """How many blocks there are."""
        return len(self._skeleton.get_submodule(self._path))

    @property
    def width(self) -> int:
        """E, the width of what goes from block to block."""
        return self.embed([0]).shape[1]

    @property
    def block_bytes(self) -> int:
        """Bytes of the largest block in float32."""
        blocks = self._skeleton.get_submodule(self._path)
        return max(sum(parameter.numel() * 4 for parameter in block.parameters()) for block in blocks)

    @property
    def stem_bytes(self) -> int:
        """Bytes of everything but the blocks in float32."""
        names = {name for name, _ in self._skeleton.named_parameters()}
        return sum(self._skeleton.get_parameter(n).numel() * 4 for n in names if not n.startswith(f"{self._path}."))

    @torch.inference_mode()
    def embed(self, tokens: Sequence[int]) -> Float32:
        """(T, E) float32: what the first block is given."""
        return self._reach(0, _ids(tokens), lambda hidden, args, kwargs: hidden)[0]

    @torch.inference_mode()
    def run(self, block: int, tokens: Sequence[int], hidden: Float32) -> Float32:
        """What block `block` makes of `hidden` (T, E), where `tokens` (T,) are the document's: (T, E) float32."""
        return self.run_all(block, tokens, hidden[None])[0]

    @torch.inference_mode()
    def run_all(self, block: int, tokens: Sequence[int], hidden: Float32) -> Float32:
        """`run` for several states of one document at once: `hidden` is (S, T, E), and so is the result."""
        if block:
            self._know_blocks()
        self._load(block)
        ids = _ids(tokens).expand(len(hidden), -1)
        return self._reach(block, ids, lambda _, args, kwargs: self._call(_copied(hidden), args, kwargs))

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int], hidden: Float32) -> Float32:
        """(T, V) float32 from what the last block gave, (T, E)."""
        self._know_blocks()
        self._drop()
        model = self._let_pass({self.depth - 1: lambda *_: self._like_a_block(_copied(hidden[None]))})
        return forward(model, _ids(tokens)).logits[0].float().numpy()

    def _reach(self, block: int, ids: torch.Tensor, act: Callable[..., torch.Tensor]) -> Float32:
        """The model's forward of `ids` (B, T) up to `block`; what `act` makes of what comes there: (B, T, E)."""

        def stop(*given: Any) -> None:
            raise _Reached(act(*given))

        model = self._let_pass({block: stop})
        try:
            forward(model, ids)
        except _Reached as reached:
            return reached.hidden.float().numpy()
        raise Unsupported(f"the forward of {type(self._skeleton).__name__} does not come to block {block}")

    def _let_pass(self, meet: dict[int, Callable[..., Any]]) -> Any:
        """The model whose blocks let the hidden state pass, but for `meet`, called with (hidden, args, kwargs).

        The blocks themselves stay in their places, without weights: some models read attributes of theirs.
        """
        if self._stem is None:
            self._stem = self._part(None)
        for index, block in enumerate(_find(self._stem, self._path)):
            block.forward = _forward(meet.get(index, lambda hidden, args, kwargs: self._like_a_block(hidden)))
        return self._stem

    def _call(self, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        result = self._block(hidden, *args, **kwargs)
        self._entries = len(result) if isinstance(result, tuple) else 0
        return result[0] if isinstance(result, tuple) else result

    def _like_a_block(self, hidden: torch.Tensor) -> Any:
        """`hidden` as this model's blocks return it."""
        return (hidden, *[None] * (self._entries - 1)) if self._entries else hidden

    def _know_blocks(self) -> None:
        """One token through the first block shows whether blocks return a tensor or a tuple."""
        if self._entries is None:
            self.run(0, [0], self.embed([0]))

    def _load(self, block: int) -> None:
        if self._loaded != block:
            self._drop()
            self._block, self._loaded = _find(self._part(block), self._path)[block], block

    def _drop(self) -> None:
        self._block, self._loaded = None, None

    def _part(self, block: int | None) -> Any:
        """A model with weights in one block alone, or, for None, everywhere but in the blocks; with its adapters."""
        model = _copy(self._skeleton)
        for name in self._names(block):
            self._fill(model, name)
        with quiet():
            model.tie_weights()
        if self._spec.attach is not None:
            model = self._spec.attach(model)
        if self._spec.merge is not None:
            model = self._merged(model, block)
        blocks = _find(model, self._path)
        tensors = _tensors(model, without=blocks) if block is None else _tensors(blocks[block])
        if any(tensor.is_meta for tensor in tensors):
            raise Unsupported("parts of the adapter are shared between blocks")
        return model.eval()

    def _merged(self, model: Any, block: int | None) -> Any:
        """PEFT merges what holds weights; the rest is out of its way meanwhile."""
        assert self._spec.merge is not None
        blocks = _find(model, self._path)
        kept = list(blocks)
        if block is None:
            for index in range(len(kept)):
                blocks[index] = torch.nn.Identity()
            model = self._spec.merge(model)
            for index, one in enumerate(kept):
                _find(model, self._path)[index] = one
            return model
        whole, model.base_model.model = model.base_model.model, torch.nn.ModuleList([kept[block]])
        (blocks[block],) = self._spec.merge(model)
        return whole

    def _names(self, block: int | None) -> list[str]:
        """Parameters and stored buffers of one part, each weight once."""
        blocks = f"{self._path}."
        inside = blocks if block is None else f"{blocks}{block}."
        names = [name for name in self._skeleton.state_dict() if name not in self._aliases]
        return [name for name in names if name.startswith(inside) is not (block is None)]

    def _fill(self, model: Any, name: str) -> None:
        """Put the stored value of `name`, in float32, into the model; a buffer that is not stored keeps its own."""
        path, _, leaf = name.rpartition(".")
        module = cast(Any, model.get_submodule(path))
        value = self._stored(name)
        if value is not None and self._spec.options.rows is not None and name in self._embeddings:
            value = _with_rows(value, self._spec.options.rows)
        if value is None:
            if leaf in module._parameters:
                raise InputRefused(f"the weight {name!r} is missing", expected="every parameter of the architecture")
            return
        expected = getattr(module, leaf).shape
        if value.shape != expected:
            raise InputRefused(f"{name!r} has shape {list(value.shape)}", expected=f"{list(expected)}, as config.json")
        value = value.to(torch.float32) if value.is_floating_point() else value
        if path in self._int8 and leaf == "weight":
            value = int8_values(value, transposed=self._int8[path], name=path)
        if leaf in module._parameters:
            module._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[leaf] = value

    def _stored(self, name: str) -> torch.Tensor | None:
        values = map(self._spec.values, stored_names(name, self._skeleton.base_model_prefix))
        return next((value for value in values if value is not None), None)


class _Reached(Exception):
    """Ends a forward at the block that was asked for."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


def _forward(meet: Callable[..., Any]) -> Callable[..., Any]:
    """A block's forward that gives its arguments to `meet`: the hidden state, (1, T, E), comes first or by its name."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        if args:
            return meet(args[0], args[1:], kwargs)
        return meet(kwargs.pop("hidden_states"), (), kwargs)

    return forward


def stored_names(name: str, prefix: str) -> tuple[str, ...]:
    """A tensor's names in a checkpoint: some carry the base model's prefix, and some do not."""
    return (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")


def without_weights(directory: Path, dtype: torch.dtype, rows: int | None = None) -> Any:
    """The architecture of config.json; parameters have no values. Buffers, such as rotary frequencies, are real.

    rows: of the embeddings, where they are not what config.json says.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    if rows is not None:
        config.get_text_config().vocab_size = rows
    with quiet(), init_empty_weights(include_buffers=False):
        model = cast(Any, AutoModelForCausalLM).from_config(
            config, dtype=dtype, attn_implementation=attention_of(directory), trust_remote_code=False
        )
    model.tie_weights()
    return model.eval()


def _copy(skeleton: Any) -> Any:
    """A copy of its own modules. What is never written into is shared: buffers, and parameters without weights."""
    shared = {id(tensor): tensor for tensor in [*skeleton.parameters(), *skeleton.buffers()]}
    return copy.deepcopy(skeleton, shared)


def _blocks_path(model: Any) -> str:
    """The path of the decoder's blocks: the one list of as many modules as config.json says there are layers."""
    depth = getattr(model.config, "num_hidden_layers", None)
    lists = [name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    found = [name for name in lists if len(model.get_submodule(name)) == depth]
    outer = [name for name in found if not any(name.startswith(f"{other}.") for other in lists if other != name)]
    if len(outer) != 1 or getattr(model.config, "is_encoder_decoder", False):
        raise Unsupported(f"{type(model).__name__} has {len(outer)} lists of {depth} blocks")
    return outer[0]


def _find(model: Any, path: str) -> Any:
    """The list of blocks, in a transformers model or in PEFT's around it."""
    inner = getattr(getattr(model, "base_model", None), "model", None)
    owner = inner if hasattr(model, "peft_config") and inner is not None else model
    return owner.get_submodule(path)


def _aliases(model: Any) -> set[str]:
    """Second names of tied weights."""
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    return {name for name, value in state.items() if first.setdefault(id(value), name) != name}


def _embedding_weights(model: Any) -> set[str]:
    """Names of the weights with a row for every token."""
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    return {f"{name}.weight" for name, module in model.named_modules() if any(module is one for one in embeddings)}


def _with_rows(value: torch.Tensor, rows: int) -> torch.Tensor:
    """As `resize` does it: the new rows are zero until the adapter is on."""
    padded = torch.zeros(rows, *value.shape[1:], dtype=value.dtype)
    padded[: len(value)] = value[:rows]
    return padded


def _tensors(module: Any, without: Any = ()) -> list[torch.Tensor]:
    """Parameters and buffers of `module` but for those of the modules in `without`."""
    left_out = {id(tensor) for one in without for tensor in [*one.parameters(), *one.buffers()]}
    return [tensor for tensor in [*module.parameters(), *module.buffers()] if id(tensor) not in left_out]


def _ids(tokens: Sequence[int]) -> torch.Tensor:
    return torch.tensor([list(tokens)])


def _copied(hidden: Float32) -> torch.Tensor:
    """Nothing that a model does reaches the caller's array."""
    return torch.from_numpy(np.array(hidden, np.float32))
