"""`inspect`, `merge`, `unmerge`: checkpoints from checkpoints."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

import exporter
from exporter import presentation
from exporter.commands.options import (
    AdapterOption,
    BaseOption,
    Dtype,
    ForceOption,
    JsonOption,
    QuietOption,
    TemplateOption,
    VerboseOption,
    WeightOption,
    size,
)
from exporter.commands.output import finish, start


class Onto(StrEnum):
    original = "original"
    int8 = "int8"


class Proof(StrEnum):
    full = "full"
    none = "none"


def inspect(
    base: BaseOption,
    adapter: AdapterOption,
    weight: WeightOption = None,
    dtype: Dtype = Dtype.auto,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Say what a merge would change, what it needs, and every problem that can be seen without reading the base."""
    progress = start(quiet, verbose)
    result = exporter.inspect(base=base, adapter=adapter, weight=weight or (), dtype=dtype, progress=progress)
    finish(result, json, presentation.inspection)


def merge(
    base: BaseOption,
    adapter: AdapterOption,
    out: Annotated[Path, typer.Option(help="The directory to write.")],
    weight: WeightOption = None,
    dtype: Annotated[Dtype, typer.Option(help="`auto` keeps each tensor's stored type.")] = Dtype.auto,
    onto: Annotated[
        Onto, typer.Option(help="`int8` adds to what the base means in 8 bits, where it was trained.")
    ] = Onto.original,
    shard_size: Annotated[str, typer.Option(help="The largest file, in decimal units.")] = "5GB",
    memory: Annotated[str, typer.Option(help="What the stream may hold.")] = "1GB",
    proof: Annotated[Proof, typer.Option(help="`full` reads the output again and proves every tensor.")] = Proof.full,
    template: TemplateOption = None,
    dry_run: Annotated[bool, typer.Option(help="Print the plan and write nothing.")] = False,
    force: ForceOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Merge adapters into their base: streamed, correctly rounded, every tensor accounted for and proven."""
    progress = start(quiet, verbose)
    if dry_run:
        plan = exporter.inspect(
            base=base,
            adapter=adapter,
            weight=weight or (),
            dtype=dtype,
            onto=onto.value,
            shard_size=size(shard_size),
            memory=size(memory),
            progress=progress,
        )
        return finish(plan, json, presentation.inspection)
    result = exporter.merge(
        base=base,
        adapter=adapter,
        out=out,
        weight=weight or (),
        dtype=dtype,
        onto=onto.value,
        shard_size=size(shard_size),
        memory=size(memory),
        proof=proof.value,
        template=template,
        force=force,
        progress=progress,
    )
    finish(result, json, presentation.merged)


def unmerge(
    merged: Annotated[Path, typer.Argument(help="A directory that `exporter merge` wrote.")],
    adapter: AdapterOption,
    out: Annotated[Path, typer.Option(help="The directory to write.")],
    base: Annotated[str | None, typer.Option(help="Where to take what rounding has put out of reach.")] = None,
    memory: Annotated[str, typer.Option(help="What the stream may hold.")] = "1GB",
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Restore the base's weights from a merged checkpoint, every tensor checked by the digest the merge noted."""
    progress = start(quiet, verbose)
    result = exporter.unmerge(merged, adapter=adapter, out=out, base=base, memory=size(memory), progress=progress)
    finish(result, json, presentation.unmerged)
