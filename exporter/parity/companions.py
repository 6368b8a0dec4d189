"""What stands beside a bundle's weights and decides what its users see: chat template, special tokens, ends of answers.

Their bytes are hashed where a manifest lists them. Here they are compared with what base and adapter say, whoever made
the bundle.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exporter.errors import InputRefused
from exporter.graph.genai_config import stop_tokens
from exporter.parity.bundles import GRAPHS, Bundle, SeparateAdapter
from exporter.parity.inputs import Pair, context
from exporter.prompts import chat_template, special_tokens
from exporter.runtime.adapters import adapter_template
from exporter.sources.checkpoint import read_json

GENERATION_CONFIG, GENAI_CONFIG = "generation_config.json", "genai_config.json"
TEMPLATE_FILES = ("chat_template.jinja", "tokenizer_config.json")
ALWAYS_NAMED = ("bos_token", "eos_token", "unk_token")  # others, such as a pad_token, trainers add as they like
SILENT_GENERATION_KEYS = ("transformers_version", "_from_model_config")


def pair_template(pair: Pair) -> str | None:
    """The adapter's chat template, else the base's."""
    directories = [*(adapter.directory for adapter in pair.adapters), pair.base.directory]
    return next((text for text in map(chat_template, directories) if text is not None), None)


def find_template(
    bundles: Sequence[Bundle], adapters: Sequence[SeparateAdapter | None], pair: Pair
) -> tuple[str | None, list[str]]:
    """The chat template that the bundles' users get, else the pair's; and what has to be said of it.

    adapters: the one that each bundle is verified with, which brings its own. InputRefused where bundles differ.
    """
    expected, notes = pair_template(pair), []
    found: dict[str, Bundle] = {}
    for bundle, adapter in zip(bundles, adapters, strict=True):
        name = adapter.name if adapter else None
        text = adapter_template(bundle.directory, name) or chat_template(bundle.directory)
        if text is None:
            if expected is not None:
                notes.append(f"{bundle.directory} has no chat template: its documents were made with another's")
            continue
        found.setdefault(text, bundle)
        if text != expected is not None and not set(TEMPLATE_FILES) & bundle.hashes.keys():
            notes.append(f"the chat template of {bundle.directory} is not the one of the adapter or base")
    if len(found) > 1:
        first, other, *_ = (bundle.directory for bundle in found.values())
        raise InputRefused(
            f"{first} and {other} have different chat templates",
            expected="bundles of one template: another makes other documents",
            todo="verify them in separate runs",
        )
    return next(iter(found), expected), list(dict.fromkeys(notes))


def check_companions(bundle: Bundle, pair: Pair) -> list[str]:
    """What has to be said of the bundle's small files.

    InputRefused where answers would not end where the base's do, where a special token is another one, or where
    genai_config.json contradicts the bundle.
    """
    directory, config = bundle.directory, read_json(bundle.directory / "config.json")
    ours, theirs = stop_tokens(pair.base.directory, pair.base.config), stop_tokens(directory, config)
    if missing := sorted(set(ours) - set(theirs)):
        raise InputRefused(
            f"answers of {directory} end at the tokens {list(theirs)}, not at {missing[0]}",
            expected=f"{list(ours)}, as the base says (eos_token_id)",
            todo="take generation_config.json and config.json from the base, or merge again",
        )
    notes = []
    if more := sorted(set(theirs) - set(ours)):
        notes.append(f"answers of {directory} end at the tokens {more} too, where the base's do not")
    tokens = special_tokens(directory)
    for name in ALWAYS_NAMED:
        if tokens.get(name) != pair.special_tokens.get(name):
            raise InputRefused(
                f"{directory} has the {name} {tokens.get(name)!r}",
                expected=f"{pair.special_tokens.get(name)!r}, as base and adapter have",
                todo="merge again: merge copies the tokenizer byte for byte",
            )
    if (directory / GENAI_CONFIG).is_file():
        _check_genai_config(bundle, theirs, context(config))
    if GENERATION_CONFIG not in bundle.hashes and _generation(pair.base.directory) != _generation(directory):
        notes.append(f"{directory / GENERATION_CONFIG} is not the base's: answers are sampled in another way")
    return notes


def _check_genai_config(bundle: Bundle, stops: Sequence[int], length: int) -> None:
    """InputRefused where onnxruntime-genai would open another graph, cut prompts, or end answers elsewhere."""
    path = bundle.directory / GENAI_CONFIG
    model = read_json(path).get("model")
    model = model if isinstance(model, dict) else {}
    decoder, ends = model.get("decoder"), model.get("eos_token_id")
    name = decoder.get("filename") if isinstance(decoder, dict) else None
    facts: list[tuple[str, Any, Any]] = [
        ("eos_token_id", set(ends if isinstance(ends, list) else [ends]), set(stops)),
        ("context_length", model.get("context_length"), length),
        ("decoder.filename", name, name if name in GRAPHS and (bundle.directory / name).is_file() else GRAPHS[0]),
    ]
    for key, found, expected in facts:
        if found != expected:
            raise InputRefused(f"{path} has {key} {found!r}", expected=f"{expected!r}", todo="export again")


def _generation(directory: Path) -> dict[str, Any]:
    """generation_config.json without who wrote it; empty where there is none."""
    path = directory / GENERATION_CONFIG
    content = read_json(path) if path.is_file() else {}
    return {key: value for key, value in content.items() if key not in SILENT_GENERATION_KEYS}
