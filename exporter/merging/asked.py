"""What the adapters ask of each tensor: every tensor of theirs is consumed by one of its parts, or refused by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from exporter.errors import InputRefused
from exporter.merging.changes import Change, LowRank, ReplaceRows
from exporter.merging.lora import lora_changes
from exporter.merging.modules import ModelLayout
from exporter.merging.saved import check_saved, replacements, token_rows
from exporter.merging.tuners import peft_changes
from exporter.sources.adapter import LORA, TRAINABLE_TOKENS, Adapter
from exporter.sources.tensors import TensorInfo


@dataclass(slots=True)
class Asked:
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


def match_adapters(
    adapters: Sequence[tuple[Adapter, float]], layout: ModelLayout, sources: Mapping[str, TensorInfo]
) -> dict[str, Asked]:
    """What is asked of each tensor, by the model's own name of it: an alias of a tied weight keeps its name here."""
    asked: dict[str, Asked] = {}
    for adapter, weight in adapters:
        changes, replaced = _read_adapter(adapter, weight, layout, sources)
        for name, info in replaced.items():
            entry = asked.setdefault(name, Asked())
            if weight != 1 or entry.replacement is not None:
                raise InputRefused(
                    f"{name!r} in {adapter.directory} replaces the base's with weight {weight:g}, or for a second time",
                    expected="one adapter with weight 1 for modules_to_save, biases and embeddings: they are no sums",
                )
            entry.replacement = info
        for name, more in changes.items():
            entry = asked.setdefault(name, Asked())
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
