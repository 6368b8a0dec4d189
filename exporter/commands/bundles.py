"""`export`, `generate`, `serve`: bundles, and what is done with them."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

import exporter
from exporter import presentation
from exporter.commands.options import (
    ForceOption,
    JsonOption,
    QuietOption,
    Target,
    VerboseOption,
    size,
)
from exporter.commands.output import finish, show, start


class ExportPrecision(StrEnum):
    native = "native"
    fp32 = "fp32"
    fp16 = "fp16"
    int8 = "int8"
    int4 = "int4"
    int8_exact = "int8-exact"


class Adapters(StrEnum):
    separate = "separate"


class Deployment(StrEnum):
    triton = "triton"
    kserve = "kserve"
    compose = "compose"


class Builder(StrEnum):
    native = "native"
    optimum = "optimum"


def export(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="A transformers directory with safetensors weights.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="In place of CHECKPOINT, with --adapter.")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="A directory or a hub id. With --adapters separate NAME=EITHER too. Repeat for several."),
    ] = None,
    adapters: Annotated[
        Adapters | None, typer.Option(help="`separate`: a graph over the base, adapters chosen at run time.")
    ] = None,
    precision: Annotated[
        list[ExportPrecision] | None,
        typer.Option(help="Repeat for several; default native. int8-exact takes --base and --adapter."),
    ] = None,
    target: Annotated[
        list[Target] | None,
        typer.Option(help="Repeat for several; default cpu. Graphs for cuda take right padding only."),
    ] = None,
    builder: Annotated[Builder, typer.Option(help="optimum serves architectures without a builder.")] = Builder.native,
    block_size: Annotated[
        int, typer.Option(help="Of int8 and int4: 32 (most exact), 64, 128 (fastest on a CPU) or 256 weights a scale.")
    ] = 32,
    deployment: Annotated[
        list[Deployment] | None,
        typer.Option(help="Files in BUNDLE/deployment that run it elsewhere. Repeat for several."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Where int8/, int4/ ... go, default beside CHECKPOINT; with --base, the bundle itself."),
    ] = None,
    force: ForceOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Write ONNX graphs with KV-cache: native points into the checkpoint's own weights, the others stream their own."""
    progress = start(quiet, verbose)
    bundles = exporter.export(
        checkpoint,
        base=base,
        adapter=adapter or (),
        adapters=None if adapters is None else adapters.value,
        precision=precision or ("native",),
        target=target or ("cpu",),
        builder=builder.value,
        block_size=block_size,
        deployment=deployment or (),
        out=out,
        force=force,
        progress=progress,
    )
    finish(presentation.Bundles(tuple(bundles)), json, presentation.bundles)


def generate(
    bundle: Annotated[Path, typer.Argument(help="A directory with a graph, or one that holds such directories.")],
    instruction: Annotated[str | None, typer.Option(help="Goes through the bundle's chat template.")] = None,
    input: Annotated[str, typer.Option(help="The instruction's input.")] = "",
    prompt: Annotated[str | None, typer.Option(help="Plain text to continue.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(min=0.01)] = 1.0,
    seed: int = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop at this text. Repeat for several.")] = None,
    adapter: Annotated[str | None, typer.Option(help="One that was exported with `--adapters separate`.")] = None,
    stream: Annotated[bool, typer.Option(help="Print pieces as they come.")] = False,
    provider: Annotated[str | None, typer.Option(help="CPUExecutionProvider or CUDAExecutionProvider.")] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Answer an instruction, or continue a prompt, with a bundle."""
    start(quiet, verbose)
    on_text = show if stream and not json else None
    result = exporter.generate(
        bundle,
        instruction=instruction,
        input=input,
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop or (),
        adapter=adapter,
        provider=provider,
        on_text=on_text,
    )
    finish(result, json, (lambda generated: "") if on_text else (lambda generated: generated.text))


def serve(
    bundle: Annotated[
        list[str],
        typer.Argument(help="DIR or NAME=DIR: a directory with a graph, or one that holds such directories."),
    ],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one and says which.")] = 8000,
    slots: Annotated[int, typer.Option(min=1, help="Streams of a bundle that are computed at once, at most.")] = 16,
    cache_memory: Annotated[
        str | None, typer.Option(help="The most for a bundle's key-value cache, 2GB; default: half of the free memory.")
    ] = None,
    queue: Annotated[int, typer.Option(min=1, help="Streams of a bundle that may wait.")] = 64,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file with the key that requests must carry; else EXPORTER_API_KEY.")
    ] = None,
    max_body: Annotated[str, typer.Option(help="The largest request, in decimal units.")] = "1MB",
    request_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds after which an answer ends.")] = 600,
    drain_timeout: Annotated[float, typer.Option(min=0, help="Seconds for accepted requests after SIGTERM.")] = 30,
    log_prompts: Annotated[bool, typer.Option(help="Prompts go into the log.")] = False,
    provider: Annotated[str | None, typer.Option(help="CPUExecutionProvider or CUDAExecutionProvider.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of onnxruntime; default: every core.")] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Serve bundles over HTTP as OpenAI's API does, many requests at once. Logs go to stderr as JSON lines."""
    start(quiet, verbose)
    ended = exporter.serve(
        bundle,
        host=host,
        port=port,
        slots=slots,
        cache_memory=None if cache_memory is None else size(cache_memory),
        queue=queue,
        api_key_file=api_key_file,
        max_body=size(max_body),
        request_timeout=request_timeout,
        drain_timeout=drain_timeout,
        log_prompts=log_prompts,
        quiet=quiet,
        provider=provider,
        threads=threads,
        on_ready=lambda ready: finish(ready, json, presentation.ready),
    )
    raise typer.Exit(ended.exit_code)
