"""Whether answers of the merged model end where its tokenizer says: an adapter may have been trained on another end."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.errors import InputRefused
from exporter.json_text import parse_json
from exporter.prompts import special_tokens
from exporter.sources.tokenizer import TOKENIZER_JSON


def unlisted_end(directory: Path, files: Mapping[str, bytes], config: Mapping[str, Any]) -> str | None:
    """What to tell the user where `directory`'s tokenizer has an end of text that ends no answer; else None.

    files: the merged checkpoint's, by name: generation_config.json and tokenizer.json. config: the base's config.json,
    whose `eos_token_id` counts where the former has none. Whatever cannot be read is left to those who need it.
    """
    try:
        text = special_tokens(directory, config.get("model_type")).get("eos_token")
        token = _token_id(parse_json(files[TOKENIZER_JSON]), text)
        generation = parse_json(files["generation_config.json"])
        stops = generation.get("eos_token_id") or config.get("eos_token_id")
    except (InputRefused, ValueError, KeyError, AttributeError, TypeError):
        return None
    listed = stops if isinstance(stops, list) else [stops]
    if token is None or token in listed or not all(isinstance(one, int) for one in listed):
        return None
    return (
        f"the tokenizer in {directory} ends an answer with {text!r} ({token}), which is not eos_token_id {stops} of "
        "generation_config.json: if answers do not end, add it there, or stop at that text"
    )


def _token_id(tokenizer: Mapping[str, Any], text: str | None) -> int | None:
    added = {one["content"]: one["id"] for one in tokenizer.get("added_tokens", ()) if {"content", "id"} <= one.keys()}
    token = added.get(text)
    if token is None and isinstance(vocabulary := tokenizer["model"].get("vocab"), dict):
        token = vocabulary.get(text)
    return token if isinstance(token, int) else None
