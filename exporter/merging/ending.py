"""Whether answers of the merged model end where its tokenizer says: an adapter may have been trained on another end."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from exporter.errors import InputRefused
from exporter.json_text import parse_json
from exporter.prompts import special_tokens
from exporter.sources.stops import listed_stops
from exporter.sources.tokenizer import TOKENIZER_JSON


def unlisted_end(directory: Path, files: Mapping[str, bytes], config: Mapping[str, Any]) -> str | None:
    """What to tell the user where `directory`'s tokenizer has an end of text that ends no answer; else None.

    files: the merged checkpoint's, by name: generation_config.json and tokenizer.json. config: the base's config.json,
    whose `eos_token_id` counts where the former has none. Whatever cannot be read is left to those who need it.
    """
    try:
        generation = parse_json(files["generation_config.json"])
        text = special_tokens(directory, config.get("model_type")).get("eos_token")
    except (InputRefused, ValueError):
        return None
    stops = listed_stops(generation, config) if isinstance(generation, dict) else ()
    token = _token_id(files[TOKENIZER_JSON], text) if stops and text is not None else None
    if token is None or token in stops:
        return None
    return (
        f"the tokenizer in {directory} ends an answer with {text!r} ({token}), which is not eos_token_id {list(stops)} "
        "of generation_config.json: if answers do not end, add it there, or stop at that text"
    )


def _token_id(tokenizer: bytes, text: str) -> int | None:
    try:
        return Tokenizer.from_buffer(tokenizer).token_to_id(text)
    except Exception:  # tokenizers (Rust) raises nothing narrower for a malformed file
        return None
