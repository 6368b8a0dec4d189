"""The small files beside the weights: config, generation_config, index, model card."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load
from transformers import AutoConfig, GenerationConfig

from exporter.merging.plan import DTYPES, MergePlan


def config_bytes(plan: MergePlan, dtype: str) -> bytes:
    """The base's own JSON, byte for byte unless the data type changed."""
    original = (plan.base.directory / "config.json").read_bytes()
    if dtype == "auto" or all(t.dtype == t.source.dtype for t in plan.tensors):
        return original
    config = dict(plan.base.config)
    key = "dtype" if "dtype" in config else "torch_dtype"
    config[key] = next(name for name, code in DTYPES.items() if code == DTYPES[dtype])
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def generation_config_bytes(base: Path) -> bytes:
    """The base's, else what transformers derives from its config."""
    path = base / "generation_config.json"
    if path.is_file():
        return path.read_bytes()
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
    """The licence that a model's card declares in its front matter, or "unknown"."""
    path = directory / "README.md"
    if not path.is_file():
        return "unknown"
    try:
        metadata: Any = metadata_load(path)
    except (ValueError, TypeError, OSError, yaml.YAMLError):
        return "unknown"
    licence = metadata.get("license_name") or metadata.get("license") if isinstance(metadata, Mapping) else None
    return licence if isinstance(licence, str) else "unknown"


def model_card(
    base: str, base_licence: str, adapters: Sequence[tuple[str, str, float, int, float]], dtype: str, changed: int
) -> bytes:
    """README.md of the merged checkpoint. adapters: (name, licence, weight, rank, alpha)."""
    rows = "\n".join(
        f"| adapter | {name} | {licence} | r={rank}, alpha={alpha:g}, weight {weight:g} |"
        for name, licence, weight, rank, alpha in adapters
    )
    licences = sorted({base_licence, *(licence for _, licence, *_ in adapters)})
    front = (
        f"---\nlibrary_name: transformers\nlicense: other\nlicense_name: {json.dumps(' + '.join(licences))}\n---\n\n"
    )
    return (
        front
        + f"""# {Path(base).name} with {", ".join(Path(name).name for name, *_ in adapters)} merged

| part | source | licence | |
|---|---|---|---|
| base | {base} | {base_licence} | |
{rows}

The terms of **both** licences apply to these weights.

Made by Exporter: W' = round(W + sum of weight * alpha/r * B A), accumulated in float32 and rounded once to {dtype}.
{changed} matrices changed; every other tensor is the base's, byte for byte. `exporter.json` lists the digest of each.
"""
    ).encode()
