"""`verify`, `capture`, `verify-manifest`, `doctor`: what holds, and what a machine can do."""

from pathlib import Path
from typing import Annotated

import typer

import exporter
from exporter import presentation
from exporter.commands.options import (
    AdapterOption,
    BaseOption,
    JsonOption,
    Level,
    QuietOption,
    TemplateOption,
    VerboseOption,
    WeightOption,
)
from exporter.commands.output import finish, start

PromptsOption = Annotated[Path | None, typer.Option(help="JSON lines; default: the packaged set.")]


def verify(
    base: BaseOption,
    adapter: AdapterOption,
    bundle: Annotated[list[Path], typer.Option(help="A directory made by merge or export. Repeat for several.")],
    weight: WeightOption = None,
    prompts: PromptsOption = None,
    reference: Annotated[str, typer.Option(help="`int8`, or a file made by `exporter capture`.")] = "int8",
    level: Level = Level.commit,
    report: Annotated[Path | None, typer.Option(help="Where to write JSON, JUnit, HTML and Markdown.")] = None,
    scratch: Annotated[
        Path | None,
        typer.Option(
            help="Where logits lie until the run is done, so that an interrupted one goes on. "
            "Default: .scratch in --report; without a report nothing is kept."
        ),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Compare bundles with the unmerged 8-bit PEFT model and with an fp32 truth: PASS, FAIL or INCONCLUSIVE."""
    progress = start(quiet, verbose)
    result = exporter.verify(
        base=base,
        adapter=adapter,
        weight=weight or (),
        bundle=bundle,
        prompts=prompts,
        reference=reference,
        level=level.value,
        report=report,
        scratch=scratch,
        progress=progress,
    )
    finish(result, json, presentation.verification)


def capture(
    base: BaseOption,
    adapter: AdapterOption,
    out: Annotated[Path, typer.Option(help="The file to write.")],
    weight: WeightOption = None,
    prompts: PromptsOption = None,
    level: Level = Level.commit,
    template: TemplateOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Record what the 8-bit PEFT model says, for a machine that cannot run it."""
    progress = start(quiet, verbose)
    result = exporter.capture(
        base=base,
        adapter=adapter,
        out=out,
        weight=weight or (),
        prompts=prompts,
        level=level.value,
        template=template,
        progress=progress,
    )
    finish(result, json, presentation.captured)


def verify_manifest(
    directory: Annotated[Path, typer.Argument(help="A merged checkpoint, a bundle, or a directory of them.")],
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Hash again every file and tensor that a directory's manifests list: 0 if all are as written, else 4."""
    progress = start(quiet, verbose)
    finish(exporter.verify_manifest(directory, progress=progress), json, presentation.manifest_check)


def doctor(json: JsonOption = False, quiet: QuietOption = False, verbose: VerboseOption = False) -> None:
    """Try what `run` needs: providers, 8-bit layers, memory, disk, the hub."""
    start(quiet, verbose)
    finish(exporter.doctor(), json, presentation.diagnosis)
