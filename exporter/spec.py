"""A run as frozen types, read from TOML. An unknown key is an error."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from exporter.errors import InputRefused, UsageError

Precision = Literal["native", "fp32", "fp16", "int8", "int4"]
Target = Literal["cpu", "cuda"]
Level = Literal["commit", "nightly", "release"]
UNITS = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 1 << 20, "GiB": 1 << 30}


def parse_size(value: object) -> int:
    """Bytes from a number or a text such as "5GB" (decimal) or "512MiB". ValueError for anything else."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, str):
        text = value.strip()
        unit = next((unit for unit in sorted(UNITS, key=len, reverse=True) if text.endswith(unit)), "")
        size = float(text.removesuffix(unit)) * UNITS.get(unit, 1)
        if 0 < size < float("inf"):
            return int(size)
    raise ValueError(f"{value!r} is not a size such as 5GB or 512MiB")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseSpec(_Frozen):
    """source: a directory or a hub id; revision: a branch, a tag or a commit of the hub."""

    source: str
    revision: str | None = None


class AdapterSpec(_Frozen):
    source: str
    revision: str | None = None
    weight: float = 1.0


class MergeSpec(_Frozen):
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    onto: Literal["original", "int8"] = "original"
    shard_size: int = 5_000_000_000
    memory: int = 1_000_000_000

    @field_validator("shard_size", "memory", mode="before")
    @classmethod
    def _size(cls, value: object) -> int:
        return parse_size(value)


class PromptSpec(_Frozen):
    """template: the name of a built-in chat template or a template's text; None: the adapter's, else the base's."""

    template: str | None = None


class ExportSpec(_Frozen):
    """block_size: weights that share a scale in int8 and int4."""

    precisions: Annotated[tuple[Precision, ...], Field(min_length=1)] = ("native",)
    targets: Annotated[tuple[Target, ...], Field(min_length=1)] = ("cpu",)
    block_size: Literal[32, 64, 128, 256] = 32


class VerifySpec(_Frozen):
    """reference: "int8" or a captured file; prompts: a JSON-lines file, default the packaged set."""

    level: Level = "commit"
    reference: str = "int8"
    prompts: str | None = None


class OutputSpec(_Frozen):
    dir: Annotated[str, Field(pattern=r"^[^\x00]+$")]


class Spec(_Frozen):
    """Everything that `exporter run` does, in the order of its stages."""

    base: BaseSpec
    adapter: tuple[AdapterSpec, ...]
    merge: MergeSpec = MergeSpec()
    prompt: PromptSpec = PromptSpec()
    export: ExportSpec = ExportSpec()
    verify: VerifySpec = VerifySpec()
    output: OutputSpec

    @field_validator("adapter", mode="before")
    @classmethod
    def _one_or_more(cls, value: object) -> object:
        """`[adapter]` is one table, `[[adapter]]` several."""
        return [value] if isinstance(value, dict) else value

    @field_validator("adapter")
    @classmethod
    def _not_empty(cls, value: tuple[AdapterSpec, ...]) -> tuple[AdapterSpec, ...]:
        if not value:
            raise ValueError("at least one adapter is needed")
        return value


def spec_of(table: Mapping[str, Any]) -> Spec:
    """A spec from what a function was given. Raises UsageError that names every wrong key."""
    try:
        return Spec.model_validate(table)
    except ValidationError as error:
        raise UsageError(_wrong_keys(error), expected="values as in a spec, see docs/run.md") from error


def read_spec(path: Path) -> Spec:
    """Read a TOML spec. Raises InputRefused that names every wrong key."""
    if path.exists() and not path.is_file():
        raise InputRefused(f"{path} is not a file", expected="a TOML file", todo="check the path")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputRefused(f"no spec at {path}", expected="a TOML file", todo="check the path") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputRefused(f"{path} is not TOML: {error}", expected="a TOML file") from error
    try:
        return Spec.model_validate(table)
    except ValidationError as error:
        raise InputRefused(
            f"{path}: {_wrong_keys(error)}",
            expected="[base] source, revision; [adapter] source, revision, weight; "
            "[merge] dtype, onto, shard_size, memory; [prompt] template; [export] precisions, targets, block_size; "
            "[verify] level, reference, prompts; [output] dir",
        ) from error


def _wrong_keys(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
