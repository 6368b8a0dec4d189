"""Tied weights and vocabularies: what an adapter separates, what stays one, and how many rows the embeddings have."""

from collections.abc import Mapping

from exporter.errors import InputRefused
from exporter.merging.asked import Asked
from exporter.merging.modules import ModelLayout, model_layout
from exporter.merging.stored_names import as_stored
from exporter.sources.checkpoint import Checkpoint
from exporter.sources.tensors import equal_bytes


def untie(base: Checkpoint, layout: ModelLayout, asked: dict[str, Asked]) -> tuple[ModelLayout, dict[str, str]]:
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


def _join_equal(layout: ModelLayout, asked: dict[str, Asked]) -> set[str]:
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
        asked[stored] = Asked(tuple(change for half in halves for change in half.changes), values[-1])
        asked.pop(alias, None)
        together.add(stored)
    return together


def new_vocabulary(base: Checkpoint, layout: ModelLayout, asked: Mapping[str, Asked]) -> int | None:
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
