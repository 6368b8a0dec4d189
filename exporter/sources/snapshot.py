"""Which files of a hub repository a model needs, and whether the cache holds them. Code is never among them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import try_to_load_from_cache

from exporter.errors import ExporterError, InputRefused
from exporter.sources.checkpoint import weight_files

Kind = Literal["base", "adapter"]

COMMIT = re.compile(r"[0-9a-f]{40}")
CONFIG = {"base": "config.json", "adapter": "adapter_config.json"}
ABOUT = re.compile(r"(LICEN[SC]E|NOTICE|README)[\w.-]*|USE_POLICY\.md", re.IGNORECASE)
TOKENIZER = frozenset(
    {
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
        "chat_template.jinja", "vocab.json", "merges.txt", "vocab.txt",
        "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    }
)  # fmt: skip
# Only whole models in the repository's root: other formats, precisions (`model.fp16...`) and training checkpoints in
# folders would be downloaded for nothing. The first pattern that matches something wins.
WEIGHTS = {
    "base": (
        re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"),
        re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin|pytorch_model\.bin\.index\.json"),
    ),
    "adapter": (re.compile(r"adapter_model\.safetensors"), re.compile(r"adapter_model\.bin")),
}


@dataclass(frozen=True, slots=True)
class Chosen:
    """Names of files to download: `weights` (with their index) and everything else."""

    small: tuple[str, ...]
    weights: tuple[str, ...]


def choose_files(names: Sequence[str], kind: Kind, repository: str) -> Chosen:
    """What a base or an adapter needs of a repository that holds `names`. InputRefused if it is not one."""
    config = CONFIG[kind]
    if config not in names:
        other = "adapter" if kind == "base" else "base"
        hint = f"it looks like {'an' if other == 'adapter' else 'a'} {other}" if CONFIG[other] in names else ""
        raise InputRefused(f"{repository} holds no {config}", expected=f"the repository of a {kind}", todo=hint)
    small = {name for name in names if name in TOKENIZER or ABOUT.fullmatch(name)} | {config}
    if kind == "base" and "generation_config.json" in names:
        small.add("generation_config.json")
    for pattern in WEIGHTS[kind]:
        if weights := [name for name in names if pattern.fullmatch(name)]:
            return Chosen(tuple(sorted(small)), tuple(sorted(weights)))
    raise InputRefused(
        f"{repository} holds no weights that can be read",
        expected="adapter_model.safetensors or adapter_model.bin"
        if kind == "adapter"
        else "model*.safetensors or pytorch_model*.bin",
    )


def cached_snapshot(id: str, revision: str, kind: Kind) -> Path | None:
    """The snapshot of `id` at `revision` in huggingface_hub's cache, if all its weights are there."""
    config = try_to_load_from_cache(id, CONFIG[kind], revision=revision)
    if not isinstance(config, str):
        return None
    directory = Path(config).parent
    return directory if _has_weights(directory, kind) else None


def is_whole(directory: Path) -> bool:
    """True if somebody fetched more than a model library does, which leaves out tokenizers, templates and licences."""
    return any(ABOUT.fullmatch(file.name) for file in directory.iterdir())


def _has_weights(directory: Path, kind: Kind) -> bool:
    if kind == "adapter":
        return any(WEIGHTS[kind][i].fullmatch(file.name) for file in directory.iterdir() for i in (0, 1))
    try:
        return all(file.is_file() for file in weight_files(directory))
    except ExporterError:  # no weights, or an index that is not one: then this snapshot does not count
        return False
