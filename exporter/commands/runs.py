"""`run`, `demo`: all stages at once."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

import exporter
from exporter import presentation
from exporter.commands.options import JsonOption, Level, QuietOption, Target, TemplateOption, VerboseOption
from exporter.commands.output import finish, start


class Precision(StrEnum):
    native = "native"
    fp32 = "fp32"
    fp16 = "fp16"
    int8 = "int8"
    int4 = "int4"


def run(
    spec: Annotated[Path | None, typer.Argument(help="A run as TOML.")] = None,
    base: Annotated[str | None, typer.Option(help="The base, where there is no spec.")] = None,
    adapter: Annotated[list[str] | None, typer.Option(help="The adapter. Repeat to add several.")] = None,
    out: Annotated[Path | None, typer.Option(help="The directory to write.")] = None,
    precision: Annotated[list[Precision] | None, typer.Option(help="Repeat for several; default native.")] = None,
    target: Annotated[list[Target] | None, typer.Option(help="Repeat for several; default cpu.")] = None,
    template: TemplateOption = None,
    level: Annotated[Level | None, typer.Option(help="How much of the prompts verify uses; default commit.")] = None,
    force: Annotated[bool, typer.Option(help="Redo every stage, and replace what the directory holds.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Merge, export, verify and report. What is done and still true is skipped. Options count before SPEC."""
    progress = start(quiet, verbose)
    result = exporter.run(
        spec,
        base=base,
        adapter=adapter or None,
        out=out,
        precision=precision or (),
        target=target or (),
        template=template,
        level=None if level is None else level.value,
        force=force,
        progress=progress,
    )
    finish(result, json, presentation.run)


def demo(
    out: Annotated[Path, typer.Option(help="The directory to write.")] = Path("artifacts/demo"),
    level: Level = Level.commit,
    force: Annotated[bool, typer.Option(help="Redo every stage, and replace what the directory holds.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Run everything on the packaged pair: a small trained base and a real LoRA adapter."""
    progress = start(quiet, verbose)
    result = exporter.demo(out=out, level=level.value, force=force, progress=progress)
    finish(result, json, presentation.run)
