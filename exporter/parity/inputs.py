"""Opening and checking what verify is given, before any model is loaded."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from exporter.errors import InputRefused, UsageError
from exporter.files import sha256_file
from exporter.merging.modules import BUILD_ERRORS, cannot_build
from exporter.parity.bases import resized_rows
from exporter.parity.bundles import Bundle
from exporter.parity.documents import (
    LEVELS,
    PACKAGED,
    Document,
    Level,
    build_documents,
    joined_inputs,
    level_rows,
    read_rows,
)
from exporter.progress import SILENT, Progress
from exporter.prompts import special_tokens
from exporter.sources.adapter import LORA, Adapter, open_adapter
from exporter.sources.checkpoint import Checkpoint, open_checkpoint, read_json
from exporter.sources.context import CONTEXT_KEYS, context_length
from exporter.sources.hub import resolve
from exporter.sources.tokenizer import TOKENIZER_JSON, build_tokenizer_json, tokenizer_files
from exporter.sources.values import read_tensor

# What a config.json says beside the function that the weights make: types, names, ids, and what others judge.
# fmt: off
SILENT_KEYS = frozenset({
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "vocab_size",
    "tie_word_embeddings", "quantization_config", "bos_token_id", "eos_token_id", "pad_token_id",
    "task_specific_params", "attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout", "hidden_dropout",
    "initializer_range", "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type",
    "summary_use_proj", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
    "gradient_checkpointing", "output_hidden_states", "output_attentions", "return_dict", "torchscript",
})
# fmt: on
ALPACA_SET = PACKAGED / "alpaca.jsonl"


@dataclass(frozen=True, slots=True)
class Pair:
    """Base and adapters, opened and hashed."""

    base: Checkpoint
    adapters: tuple[Adapter, ...]
    weighted: tuple[tuple[Path, float], ...]
    base_files: dict[str, str]
    adapter_files: dict[str, str]
    tokenizer: Tokenizer
    special_tokens: dict[str, str]  # what a chat template may name
    vocabulary: int
    context: int
    rows: int | None = None  # of the embeddings, where an adapter resized them

    @property
    def vocab_size(self) -> int | None:
        """Rows of the embeddings, as config.json or the adapter says."""
        return self.rows or self.base.config.get("vocab_size")


def resolve_pair(
    base: str | Path, adapter: str | Path | Sequence[str | Path], weight: Sequence[float], progress: Progress = SILENT
) -> tuple[Path, list[tuple[Path, float]]]:
    """Directories of base and adapters, fetched from the hub where they are ids; each adapter with its weight."""
    adapters = [adapter] if isinstance(adapter, str | Path) else list(adapter)
    weights = list(weight) or [1.0] * len(adapters)
    if not adapters or len(weights) != len(adapters):
        raise UsageError(f"{len(weights)} weights for {len(adapters)} adapters", expected="one weight an adapter")
    directories = [resolve(one, kind="adapter", progress=progress).directory for one in adapters]
    return resolve(base, kind="base", progress=progress).directory, list(zip(directories, weights, strict=True))


def open_pair(base: Path, adapters: Sequence[tuple[Path, float]], progress: Progress = SILENT) -> Pair:
    """InputRefused for a malformed base or adapter, or an adapter that changes nothing."""
    checkpoint = open_checkpoint(base)
    opened = [open_adapter(directory) for directory, _ in adapters]
    for adapter in opened:
        _require_change(adapter)
    files = [*checkpoint.files, base / "config.json"]
    with progress.task("hash base and adapter", sum(f.stat().st_size for f in files), "B") as task:
        base_files = {}
        for path in files:
            base_files[path.name] = sha256_file(path)
            task.advance(path.stat().st_size)
    adapter_files = {
        f"{i}/{path.name}": sha256_file(path)
        for i, adapter in enumerate(opened)
        for path in (adapter.file, adapter.directory / "adapter_config.json")
    }
    tokenizer_directory = tokenizer_files(base, [adapter.directory for adapter in opened]).directory
    tokenizer = load_tokenizer(tokenizer_directory)
    rows = resized_rows(checkpoint, opened)
    ids = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1  # some may be missing
    vocabulary = min(rows or int(checkpoint.config.get("vocab_size", 1 << 62)), ids)
    return Pair(
        checkpoint,
        tuple(opened),
        tuple(adapters),
        base_files,
        adapter_files,
        tokenizer,
        special_tokens(tokenizer_directory, checkpoint.config.get("model_type")),
        vocabulary,
        context(checkpoint.config),
        rows,
    )


def load_tokenizer(directory: Path) -> Tokenizer:
    """tokenizer.json, or the one that transformers makes of vocab.json and merges.txt; it neither cuts nor pads."""
    path = directory / TOKENIZER_JSON
    data = path.read_bytes() if path.is_file() else build_tokenizer_json(directory)
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # tokenizers (Rust) raises plain Exception
        raise InputRefused(
            f"{path} is not a tokenizer ({error})", expected="a tokenizer.json", todo="fetch it again"
        ) from error
    tokenizer.no_truncation()  # what a training run left in the file
    tokenizer.no_padding()
    return tokenizer


def context(config: dict[str, Any]) -> int:
    """The longest input the architecture takes, in tokens."""
    length = context_length(config)
    if length is None:
        raise InputRefused("config.json names no context length", expected=" or ".join(CONTEXT_KEYS))
    return length


def end_of_text(config: dict[str, Any]) -> int | None:
    value = config.get("eos_token_id")
    return value[0] if isinstance(value, list) and value else value if isinstance(value, int) else None


def make_documents(
    pair: Pair, prompts: Path | None, level: Level, template: str | None
) -> tuple[list[Document], list[str]]:
    """The documents of a level, and what has to be said about them."""
    given = read_rows(prompts or ALPACA_SET)
    chosen = level_rows(given, level, packaged=prompts is None)
    rows = joined_inputs(chosen, template, pair.special_tokens)
    documents = build_documents(
        rows,
        pair.tokenizer,
        template=template,
        special_tokens=pair.special_tokens,
        end_of_text=end_of_text(pair.base.config),
        context=pair.context,
        response_tokens=LEVELS[level].response_tokens,
    )
    largest = max(max(document.tokens) for document in documents)
    if pair.vocab_size is not None and largest >= pair.vocab_size:
        raise InputRefused(
            f"the tokenizer gives the token {largest}", expected=f"ids below {pair.vocab_size}, the vocabulary"
        )
    notes = []
    if template is None and any(row.instruction for row in rows):
        notes.append("no chat template: instructions were fed plainly, as instruction, blank line, input")
    if joined := sum(row.input != before.input for row, before in zip(rows, chosen, strict=True)):
        notes.append(f"the chat template has no place for an input: {joined} were put behind their instructions")
    if prompts is not None and len(chosen) < len(given):
        notes.append(f"{level} takes {len(chosen)} of the {len(given)} prompts; --level nightly takes all")
    if len(documents) < len(rows):
        notes.append(f"{len(rows) - len(documents)} of {len(rows)} prompts have no second token and were not scored")
    cut = sum(document.truncated for document in documents)
    if cut:
        notes.append(f"{cut} of {len(documents)} documents were cut at the context of {pair.context} tokens")
    return documents, notes


def check_bundle_inputs(bundle: Bundle, pair: Pair, documents: Sequence[Document]) -> None:
    """InputRefused where the bundle's tokenizer or context is not the one that the documents were made with."""
    check_config(bundle, pair)
    tokenizer = load_tokenizer(bundle.directory)
    ours, theirs = pair.tokenizer.get_vocab(with_added_tokens=True), tokenizer.get_vocab(with_added_tokens=True)
    if ours != theirs:
        odd = next(iter(set(ours.items()) ^ set(theirs.items())))
        raise InputRefused(
            f"the tokenizer of {bundle.directory} differs from the one of the base and adapter, such as at {odd}",
            expected="the same vocabulary",
            todo="merge again: merge copies the tokenizer byte for byte",
        )
    odd = _different_part(pair.tokenizer, tokenizer)
    if odd is not None:
        raise InputRefused(
            f"the tokenizer of {bundle.directory} has another {odd} than the one of the base and adapter",
            expected="the same tokenizer",
            todo="merge again: merge copies the tokenizer byte for byte",
        )
    for document in documents:
        text = pair.tokenizer.decode(list(document.tokens), skip_special_tokens=False)
        if tokenizer.encode(text).ids != pair.tokenizer.encode(text).ids:
            raise InputRefused(
                f"the tokenizer of {bundle.directory} splits document {document.index} otherwise than the base's",
                expected="equal token ids",
                todo="merge again: merge copies the tokenizer byte for byte",
            )
    length = context(read_json(bundle.directory / "config.json"))
    if length < max(len(document.tokens) for document in documents):
        raise InputRefused(f"{bundle.directory} takes {length} tokens", expected=f"{pair.context}, as the base")


def check_config(bundle: Bundle, pair: Pair) -> None:
    """InputRefused where the bundle's config.json describes another model than the base's: F would be that model.

    Compared as transformers reads them, but for what says nothing about the function: see SILENT_KEYS.
    """
    from transformers import AutoConfig

    def read(directory: Path) -> dict[str, Any]:
        try:
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True).to_dict()
        except BUILD_ERRORS as error:
            raise cannot_build(directory, error) from error
        return {key: value for key, value in config.items() if not _is_silent(key)}

    ours, theirs = read(pair.base.directory), read(bundle.directory)
    odd = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if odd:
        raise InputRefused(
            f"config.json of {bundle.directory} has {odd[0]} = {theirs.get(odd[0])!r}",
            expected=f"{ours.get(odd[0])!r}, as the base",
            todo="merge again: merge keeps what the base's config.json says of the model",
        )


def _is_silent(key: str) -> bool:
    """True for what makes no difference to the logits: see SILENT_KEYS; defaults of sampling; who wrote the file."""
    from transformers import GenerationConfig

    known = SILENT_KEYS | GenerationConfig().to_dict().keys()
    return key in known or key.endswith("_version") or key.startswith("unsloth_")


def _different_part(ours: Tokenizer, theirs: Tokenizer) -> str | None:
    """The first part in which two tokenizers differ; truncation and padding are the caller's choice, not parts."""
    one, other = json.loads(ours.to_str()), json.loads(theirs.to_str())
    parts = ("model", "normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens")
    return next((part for part in parts if one.get(part) != other.get(part)), None)


def _require_change(adapter: Adapter) -> None:
    """Every value is finite, and LoRA factors alone are not all zero on one side.

    Whatever else an adapter holds is judged by what it makes of the base: `Oracle.require_change`.
    """
    alive = {"lora_A": False, "lora_B": False, "lora_embedding_A": False, "lora_embedding_B": False}
    for name, info in adapter.tensors.items():
        factor = read_tensor(info)
        if factor.is_floating_point() and not torch.isfinite(factor.float()).all():
            raise InputRefused(f"{name}: the adapter holds NaN or infinity", expected="finite factors")
        for kind in alive:
            alive[kind] = alive[kind] or (f".{kind}" in name and bool(factor.any()))
    linear = alive["lora_A"] and alive["lora_B"]
    embedding = alive["lora_embedding_A"] and alive["lora_embedding_B"]
    factors_alone = all(any(f".{kind}" in name for kind in alive) for name in adapter.tensors)
    if adapter.method == LORA and factors_alone and not linear and not embedding:
        raise InputRefused(
            f"the adapter in {adapter.directory} changes nothing: every B (or A) is zero",
            expected="a trained adapter",
            todo="check that training ran and that the right checkpoint was saved",
        )
