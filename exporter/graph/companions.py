"""The small files that stand beside a bundle's weights: configuration, tokenizer, template, model card."""

from pathlib import Path

from exporter.sources.tokenizer import TOKENIZER_JSON, build_tokenizer_json

# What makes a bundle complete alone: copied byte for byte where the checkpoint has it.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "README.md",
)


def companions(source: Path) -> dict[str, bytes]:
    """What makes a bundle complete alone, by name. InputRefused for a tokenizer that cannot be read."""
    files = {name: (source / name).read_bytes() for name in COMPANIONS if (source / name).is_file()}
    if TOKENIZER_JSON not in files and {"vocab.json", "merges.txt"} <= set(files):  # a GPT-2 of 2023
        files[TOKENIZER_JSON] = build_tokenizer_json(source)
    return files
