"""What each stored tensor must be: the oracle for weights. Its values are PEFT's own, in float64: see `peft_source`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from exporter.errors import InputRefused
from exporter.parity.bases import BaseOptions, meta_model, resized_rows
from exporter.parity.int8_base import Onto, int8_modules, int8_values
from exporter.parity.peft_source import Merged, Source, open_source
from exporter.sources.adapter import LORA, TRAINABLE_TOKENS, Adapter, open_adapter
from exporter.sources.checkpoint import Checkpoint
from exporter.sources.tensors import TensorInfo
from exporter.sources.values import read_tensor

Float = NDArray[np.float64]

# fmt: off
# Methods whose merge PEFT does in float64 and in float32, on copies of single layers: each was tried.
METHODS = frozenset({
    LORA, TRAINABLE_TOKENS, "ADALORA", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "GLORA", "GRALORA", "HIRA",
    "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "PVERA", "RANDLORA", "ROAD",
    "SHIRA", "SUPERTUNING", "TINYLORA", "UNILORA", "VBLORA", "VERA", "WAVEFT",
})
# fmt: on


@dataclass(frozen=True, slots=True)
class Adapted:
    """One tensor that the adapter changes. `merged` is PEFT's merge in float64, in the checkpoint's orientation.

    original: the base's value, or what its int8 codes mean; rows that the base does not have are zero.
    slack: what float32 arithmetic may add to each element before the rounding, as the method's bound says; plain LoRA:
    sum_k (r_k + 2) 2^-24 |weight_k s_k| (|B_k| |A_k|). is_exact: the value is only replaced, and must be rounded right.
    plain: DoRA without its magnitude.
    """

    name: str  # without the model's prefix
    original: Float
    merged: Float
    slack: Float
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    alphas: tuple[float, ...]
    is_exact: bool = False
    plain: Float | None = None
    is_sum: bool = True  # W' = W + delta with a delta that does not depend on W

    @property
    def delta(self) -> Float:
        return self.merged - self.original

    def delta_of(self, rows: slice) -> Float:
        """Some rows of `delta`."""
        return self.merged[rows] - self.original[rows]


class Oracle:
    """The expected tensors of one base with its adapters, onto the base's own weights or its int8 codes.

    `untied`: names that are one weight with another in the base and that the adapter parts. InputRefused for what
    verify cannot judge, by name.
    """

    def __init__(self, base: Checkpoint, adapters: Sequence[tuple[Path, float]], onto: Onto = "original") -> None:
        self.base = base
        self.onto: Onto = onto
        self.weights = tuple(weight for _, weight in adapters)
        opened = [open_adapter(directory) for directory, _ in adapters]
        _refuse_unverifiable(opened, self.weights)
        self.rows = resized_rows(base, opened)
        model = meta_model(base.directory)
        self.prefix = f"{model.base_model_prefix}." if getattr(model, "base_model_prefix", "") else ""
        self._state, aliases = _parameters(model)  # the model's names, in its order
        self._aliases = {self.canonical(alias): self.canonical(name) for alias, name in aliases.items()}
        self.parameters = frozenset(map(self.canonical, self._state))
        self._int8 = (
            {self.canonical(f"{n}.weight"): t for n, t in int8_modules(model).items()} if onto == "int8" else {}
        )
        options = BaseOptions(onto, self.rows)
        self._sources: list[Source] = [open_source(base, adapter, options) for adapter in opened]
        self.untied: frozenset[str] = frozenset()
        self._names = self._resolve_ties(self._changed_names())

    @property
    def names(self) -> list[str]:
        """Names of the adapted tensors, without the model's prefix, in the model's order."""
        return self._names

    @property
    def state_names(self) -> list[str]:
        """All names of the model's state, without its prefix, in its order."""
        return list(map(self.canonical, self._state))

    @property
    def int8_names(self) -> list[str]:
        """Names of the weights that stand on int8 codes; none for onto "original"."""
        return list(self._int8)

    @property
    def expected_names(self) -> set[str]:
        """The tensors of a right checkpoint: the base's, a tied weight once."""
        tied = self._aliases.keys() - self.untied
        return {name for name in self.parameters - tied if self._find(name) is not None}

    @property
    def optional_names(self) -> set[str]:
        """Second names of tied weights, which a checkpoint may hold and transformers ignores."""
        return set(self._aliases.keys() - self.untied)

    def canonical(self, name: str) -> str:
        """A tensor's name without the prefix that some checkpoints carry and some do not."""
        return name.removeprefix(self.prefix)

    def base_tensor(self, name: str) -> str:
        """The checkpoint's own name for a canonical one."""
        found = self._find(name)
        if found is None:
            raise InputRefused(
                f"the base has no tensor {name!r}, which the adapter changes",
                expected="the base this adapter was trained on",
            )
        return found

    def base_info(self, name: str) -> TensorInfo:
        return self.base.tensors[self.base_tensor(name)]

    def original(self, name: str) -> torch.Tensor:
        """The base's value in its stored type, or, in float32, what its int8 codes mean."""
        value = read_tensor(self.base_info(name))
        return int8_values(value, transposed=self._int8[name], name=name) if name in self._int8 else value

    def adapted(self) -> Iterator[Adapted]:
        """Each tensor that some adapter changes, merged by PEFT in float64."""
        for name in self.names:
            yield self.merge(name)

    def merge(self, name: str) -> Adapted:
        """PEFT's merge of one tensor; several adapters of plain LoRA add up with their weights."""
        full = self.prefix + name if self.prefix + name in self._state else name
        original = self.original(name).double()
        found = [source.merge(full, original, self._module_values(name)) for source in self._holding(full)]
        value, slack = found[0].value, found[0].slack
        original = _padded(original, value)
        if len(self._sources) > 1 or self.weights[0] != 1:
            weights = [w for w, source in zip(self.weights, self._sources, strict=True) if full in source.names()]
            value, slack = original.clone(), torch.zeros_like(original)
            for weight, one in zip(weights, found, strict=True):
                assert one.slack is not None
                value += weight * (one.value - original)
                slack += abs(weight) * one.slack
        return self._adapted(name, original, value, slack, found)

    def require_change(self) -> None:
        """InputRefused where no adapter changes any value: it was never trained, or saved wrongly."""
        for adapted in self.adapted():
            if adapted.delta.any():
                return
        raise InputRefused(
            "the adapter changes nothing: every tensor it touches keeps the base's values",
            expected="a trained adapter",
            todo="check that training ran and that the right checkpoint was saved",
        )

    def release(self) -> None:
        """Give memory back between uses."""
        for source in self._sources:
            source.release()

    def _adapted(
        self, name: str, original: torch.Tensor, value: torch.Tensor, slack: torch.Tensor | None, found: list[Merged]
    ) -> Adapted:
        weights = self.weights if len(found) == len(self.weights) else (1.0,) * len(found)
        lora = [(one, weight) for one, weight in zip(found, weights, strict=True) if one.rank is not None]
        plain = found[0].plain
        return Adapted(
            name,
            original.numpy(),
            value.numpy(),
            (torch.zeros_like(original) if slack is None else slack).numpy(),
            tuple(one.rank for one, _ in lora if one.rank is not None),
            tuple(weight * one.scaling for one, weight in lora),
            tuple(weight * one.alpha for one, weight in lora),
            slack is None,
            None if plain is None else plain.numpy(),
            slack is not None and plain is None and all(one.rank is not None for one in found),
        )

    def _holding(self, full: str) -> list[Source]:
        return [source for source in self._sources if full in source.names()]

    def _module_values(self, name: str) -> dict[str, torch.Tensor]:
        """The base's values of the module that `name` belongs to, by parameter."""
        module = name.rpartition(".")[0]
        owned = [one for one in self.parameters if one.rpartition(".")[0] == module and self._find(one)]
        return {one.rpartition(".")[2]: self.original(one) for one in owned}

    def _find(self, name: str) -> str | None:
        partners = [self._aliases.get(name), *(alias for alias, stored in self._aliases.items() if stored == name)]
        for one in (name, *(partner for partner in partners if partner)):
            for candidate in (one, self.prefix + one):
                if candidate in self.base.tensors:
                    return candidate
        return None

    def _changed_names(self) -> list[str]:
        found: dict[str, None] = {}
        for source in self._sources:
            found.update(dict.fromkeys(self.canonical(name) for name in source.names()))
        return list(found)

    def _resolve_ties(self, names: list[str]) -> list[str]:
        """Two names of one weight stay one where both become the same; else the adapter parts them.

        What counts is what the unmerged model computes at each place: the adapter of one module is not the other's.
        """
        for alias, stored in self._aliases.items():
            ours, theirs = alias in names, stored in names
            if not ours and not theirs:
                continue
            if ours and theirs and np.array_equal(self.merge(alias).merged, self.merge(stored).merged):
                names = [name for name in names if name != alias]
            elif not ours and self._is_shared(alias, stored):
                continue
            elif not theirs and self._is_shared(stored, alias):
                names = [stored if name == alias else name for name in names]
            else:
                self.untied |= {alias}
        return names

    def _is_shared(self, silent: str, changed: str) -> bool:
        """True where PEFT loaded the changed value into the weight that both modules share."""
        source: Any = self._sources[0]
        full = [next(n for n in self._state if self.canonical(n) == name) for name in (silent, changed)]
        return len(self._sources) == 1 and hasattr(source, "is_shared") and source.is_shared(*full)


def _padded(original: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`original` with rows of zeros where the adapter's vocabulary is longer, cut where it is shorter."""
    if original.shape == value.shape:
        return original
    if original.shape[1:] != value.shape[1:]:
        raise InputRefused(
            f"the adapter gives a tensor of shape {list(value.shape)}", expected=f"{list(original.shape)}, as the base"
        )
    padded = torch.zeros_like(value)
    rows = min(len(original), len(value))
    padded[:rows] = original[:rows]
    return padded


def _parameters(model: Any) -> tuple[list[str], dict[str, str]]:
    """Names of the state dict, and the second names of tied weights with the first."""
    first: dict[int, str] = {}
    aliases = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) in first:
            aliases[name] = first[id(value)]
        first.setdefault(id(value), name)
    return list(model.state_dict()), aliases


def _refuse_unverifiable(adapters: Sequence[Adapter], weights: Sequence[float]) -> None:
    """What verify has no expected value for, by name."""
    for adapter, weight in zip(adapters, weights, strict=True):
        if adapter.method not in METHODS:
            _refuse(adapter, f"a {adapter.method} adapter", f"one of {', '.join(sorted(METHODS))}")
        if adapter.config.get("target_parameters"):
            _refuse(adapter, "an adapter with target_parameters", "target_modules")
        plain = adapter.method == LORA and not adapter.config.get("use_dora")
        if (len(adapters) > 1 or weight != 1) and not (plain and all(".lora_" in name for name in adapter.tensors)):
            _refuse(adapter, "more than plain LoRA, weighted or beside another adapter", "one such adapter, weight 1")


def _refuse(adapter: Adapter, seen: str, expected: str) -> None:
    raise InputRefused(f"{adapter.directory} is {seen}", expected=expected, todo="verify has no bound for it yet")
