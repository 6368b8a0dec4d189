"""Options and choices that several commands have."""

from enum import StrEnum
from typing import Annotated

import typer

from exporter.spec import parse_size


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Target(StrEnum):
    cpu = "cpu"
    cuda = "cuda"


class Level(StrEnum):
    commit = "commit"
    nightly = "nightly"
    release = "release"


BaseOption = Annotated[str, typer.Option(help="The base: a directory or a hub id, `owner/name[@revision]`.")]
AdapterOption = Annotated[list[str], typer.Option(help="The adapter: a directory or a hub id. Repeat to add several.")]
WeightOption = Annotated[list[float] | None, typer.Option(help="One for each adapter; default 1.")]
TemplateOption = Annotated[str | None, typer.Option(help="A chat template's name (`alpaca`) or text.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Libraries' own messages, and tracebacks.")]
ForceOption = Annotated[bool, typer.Option(help="Replace what the output directory holds.")]


def size(text: str) -> int:
    """Bytes; a usage error for what is no size."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
