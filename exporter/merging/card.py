"""The small files beside the weights: config, generation_config, index, model card."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from exporter import prompts
from exporter.errors import UsageError
from exporter.merging.ending import unlisted_end
from exporter.merging.plan import DTYPES, MergePlan
from exporter.progress import Progress
from exporter.sources.adapter import Adapter
from exporter.sources.checkpoint import read_json
from exporter.sources.hub import Source
from exporter.sources.tokenizer import TOKENIZER_JSON, build_tokenizer_json, tokenizer_files

FRONT_MATTER = 64 << 10  # bytes of a card that are looked at; most have one or two thousand before their text
ENTRY = 400  # letters of the entry that states a licence
# A card is anybody's text, and YAML a language to write bombs in: only the entries that are asked for are parsed.
STATED = re.compile(r"^(license|license_name)[ \t]*:.*(?:\n[ \t]+.*)*", re.MULTILINE)


def small_files(
    plan: MergePlan,
    base: Source,
    adapters: Sequence[Source],
    dtype: str,
    template: str | None,
    progress: Progress,
) -> dict[str, bytes]:
    """Everything beside the weights, by file name."""
    files = {"config.json": config_bytes(plan, dtype)}
    if len(plan.shards) > 1:
        files["model.safetensors.index.json"] = index_bytes(plan)
    files |= text_files(base, adapters, template, progress)
    files["README.md"] = model_card(
        base.id or base.directory.name,
        licence_of(base.directory),
        [_card_row(source, *pair) for source, pair in zip(adapters, plan.adapters, strict=True)],
        plan.config_dtype,
        len(plan.changed),
    )
    return files


def text_files(base: Source, adapters: Sequence[Source], template: str | None, progress: Progress) -> dict[str, bytes]:
    """What turns text into tokens and back, by file name: generation config, tokenizer, chat template.

    Tokenizer and template are the first adapter's that has one, else the base's; `template` comes before both.
    """
    directories = [source.directory for source in adapters]
    files = {"generation_config.json": generation_config_bytes(base.directory)}
    chosen = tokenizer_files(base.directory, directories)
    files |= {path.name: path.read_bytes() for path in chosen.files}
    if TOKENIZER_JSON not in files:
        progress.note(f"{chosen.directory} has no {TOKENIZER_JSON}: it is built from its vocabulary")
        files[TOKENIZER_JSON] = build_tokenizer_json(chosen.directory)
    text = choose_template(template, [*directories, base.directory])
    if text is not None:
        files["chat_template.jinja"] = text.encode()
    if end := unlisted_end(chosen.directory, files, read_json(base.directory / "config.json")):
        progress.note(end)
    return files


def choose_template(template: str | None, directories: Sequence[Path]) -> str | None:
    """The named or given template, else the first that a directory has, else None: it is never invented."""
    if template is not None:
        if template in prompts.TEMPLATES:
            return prompts.TEMPLATES[template]
        if "{" not in template:
            raise UsageError(f"no chat template is named {template!r}", expected=", ".join(prompts.TEMPLATES))
        return template
    return next((text for directory in directories if (text := prompts.chat_template(directory)) is not None), None)


def config_bytes(plan: MergePlan, dtype: str) -> bytes:
    """The base's own JSON, byte for byte unless the data type, the vocabulary or the tie of embeddings changed."""
    changes: dict[str, Any] = {}
    if dtype != "auto" and any(t.dtype != t.base.dtype for t in plan.tensors):
        key = "dtype" if "dtype" in plan.base.config else "torch_dtype"
        changes[key] = next(name for name, code in DTYPES.items() if code == DTYPES[dtype])
    if plan.vocab_size is not None:
        changes["vocab_size"] = plan.vocab_size
    if plan.untied:
        changes["tie_word_embeddings"] = False
    if not changes:
        return (plan.base.directory / "config.json").read_bytes()
    config = dict(plan.base.config)
    text = config.get("text_config")
    if isinstance(text, dict) and "vocab_size" in text and "vocab_size" in changes:  # a model of several parts
        config["text_config"] = {**text, "vocab_size": changes.pop("vocab_size")}
    return (json.dumps({**config, **changes}, indent=2, ensure_ascii=False) + "\n").encode()


def generation_config_bytes(base: Path) -> bytes:
    """The base's, else what transformers derives from its config."""
    path = base / "generation_config.json"
    if path.is_file():
        return path.read_bytes()
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(base, trust_remote_code=False, local_files_only=True)
    return GenerationConfig.from_model_config(config).to_json_string(use_diff=True).encode()


def shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def index_bytes(plan: MergePlan) -> bytes:
    """`model.safetensors.index.json` as save_pretrained writes it; tied weights count once."""
    names = shard_names(len(plan.shards))
    weight_map = {t.name: file for file, shard in zip(names, plan.shards, strict=True) for t in shard}
    metadata = {"total_parameters": plan.parameters, "total_size": plan.nbytes}
    return (json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n").encode()


def licence_of(directory: Path) -> str:
    """The licence that a model's card declares in its front matter, in one short line, or "unknown"."""
    path = directory / "README.md"
    if not path.is_file():
        return "unknown"
    try:
        stated = {found[1]: found[0] for found in STATED.finditer(_front_matter(path))}
        licence = _text(stated.get("license_name", "")) or _text(stated.get("license", ""))
    except (ValueError, OverflowError, RecursionError, OSError, yaml.YAMLError):
        return "unknown"
    return licence if licence.isprintable() and licence else "unknown"


def _front_matter(path: Path) -> str:
    """What stands between the card's first line and the next one of three dashes; nothing where that comes too late."""
    with path.open("rb") as file:
        lines = file.read(FRONT_MATTER).lstrip().splitlines()
    if lines[:1] != [b"---"] or b"---" not in lines[1:]:
        return ""
    return b"\n".join(lines[1 : lines.index(b"---", 1)]).decode()


def _text(entry: str) -> str:
    """The value of one entry of a mapping where it is text, else nothing. Nothing is built of the YAML's nodes."""
    node = yaml.compose(entry, yaml.SafeLoader) if len(entry) <= ENTRY else None
    match node:
        case yaml.MappingNode(value=[(_, yaml.ScalarNode(tag="tag:yaml.org,2002:str", value=text))]):
            return text
    return ""


@dataclass(frozen=True, slots=True)
class CardRow:
    """One adapter as the model card names it. how: its method and numbers."""

    name: str
    licence: str
    how: str


def _card_row(source: Source, adapter: Adapter, weight: float) -> CardRow:
    numbers = [
        f"{label}={adapter.config[key]:g}"
        for key, label in (("r", "r"), ("lora_alpha", "alpha"))
        if isinstance(adapter.config.get(key), int | float)
    ]
    how = ", ".join([adapter.method, *numbers, f"weight {weight:g}"])
    return CardRow(source.id or source.directory.name, licence_of(source.directory), how)


def model_card(base: str, base_licence: str, adapters: Sequence[CardRow], dtype: str, changed: int) -> bytes:
    """README.md of the merged checkpoint."""
    rows = "\n".join(f"| adapter | {row.name} | {row.licence} | {row.how} |" for row in adapters)
    licences = sorted({base_licence, *(row.licence for row in adapters)})
    front = (
        f"---\nlibrary_name: transformers\nlicense: other\nlicense_name: {json.dumps(' + '.join(licences))}\n---\n\n"
    )
    return (
        front
        + f"""# {Path(base).name} with {", ".join(Path(row.name).name for row in adapters)} merged

| part | source | licence | |
|---|---|---|---|
| base | {base} | {base_licence} | |
{rows}

The terms of **both** licences apply to these weights.

Made by Exporter: W' = round(W + delta), for LoRA W + sum of weight * alpha/r * B A, accumulated in float32 and rounded
once to {dtype}.
{changed} tensors changed; every other tensor is the base's, byte for byte. `exporter.json` lists the digest of each.
"""
    ).encode()
