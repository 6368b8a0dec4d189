"""The command line: flags to functions. No logic; the only place that prints and exits."""

import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

import exporter
from exporter import presentation
from exporter.errors import EnvironmentLacking, ExporterError, UsageError, lacking
from exporter.progress import Progress
from exporter.spec import parse_size
from exporter.terminal import terminal_progress

# typer carries its own copy of click: what a wrong flag raises is the base of BadParameter.
UsageMessage: Any = typer.BadParameter.__bases__[0]

app = typer.Typer(
    name="exporter",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Merge a PEFT adapter into its base, export it to ONNX without copying a weight, and prove that both still "
    "say what the unmerged 8-bit PEFT model said.",
    epilog="Exit codes: 0 done or passed, 1 parity failed, 2 usage, 3 not enough evidence, 4 input refused, "
    "5 environment lacking, 130 interrupted, 143 terminated.",
)


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Precision(StrEnum):
    native = "native"
    fp32 = "fp32"
    fp16 = "fp16"
    int8 = "int8"
    int4 = "int4"


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


class Target(StrEnum):
    cpu = "cpu"
    cuda = "cuda"


class Level(StrEnum):
    commit = "commit"
    nightly = "nightly"
    release = "release"


class Onto(StrEnum):
    original = "original"
    int8 = "int8"


class Proof(StrEnum):
    full = "full"
    none = "none"


class Builder(StrEnum):
    native = "native"
    optimum = "optimum"


BaseOption = Annotated[str, typer.Option(help="The base: a directory or a hub id, `owner/name[@revision]`.")]
AdapterOption = Annotated[list[str], typer.Option(help="The adapter: a directory or a hub id. Repeat to add several.")]
WeightOption = Annotated[list[float] | None, typer.Option(help="One for each adapter; default 1.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Libraries' own messages, and tracebacks.")]
ForceOption = Annotated[bool, typer.Option(help="Replace what the output directory holds.")]


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _start(quiet: bool, verbose: bool) -> Progress:
    if not verbose:
        warnings.filterwarnings("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        logging.disable(logging.ERROR)
    return terminal_progress(quiet=quiet)


def _finish(result: Any, as_json: bool, text: Callable[[Any], str]) -> None:
    """Print the result on stdout and exit with the code it carries."""
    print(json.dumps(result.to_dict(), indent=2, ensure_ascii=False) if as_json else text(result), flush=True)
    code = getattr(result, "exit_code", 0)
    if code:
        raise typer.Exit(code)


@app.command(epilog="`exporter inspect --base artifacts/base --adapter artifacts/adapter --json`")
def inspect(
    base: BaseOption,
    adapter: AdapterOption,
    weight: WeightOption = None,
    dtype: Dtype = Dtype.auto,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Say from headers alone what a merge would change, what it needs, and every problem that can be seen."""
    progress = _start(quiet, verbose)
    result = exporter.inspect(base=base, adapter=adapter, weight=weight or (), dtype=dtype, progress=progress)
    _finish(result, json, presentation.inspection)


@app.command(epilog="`exporter merge --base owner/base --adapter owner/adapter --out merged`")
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
    template: Annotated[str | None, typer.Option(help="A chat template's name (`alpaca`) or text.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Print the plan and write nothing.")] = False,
    force: ForceOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Merge adapters into their base: streamed, correctly rounded, every tensor accounted for and proven."""
    progress = _start(quiet, verbose)
    if dry_run:
        plan = exporter.inspect(
            base=base,
            adapter=adapter,
            weight=weight or (),
            dtype=dtype,
            onto=onto.value,
            shard_size=_size(shard_size),
            memory=_size(memory),
            progress=progress,
        )
        return _finish(plan, json, presentation.inspection)
    result = exporter.merge(
        base=base,
        adapter=adapter,
        out=out,
        weight=weight or (),
        dtype=dtype,
        onto=onto.value,
        shard_size=_size(shard_size),
        memory=_size(memory),
        proof=proof.value,
        template=template,
        force=force,
        progress=progress,
    )
    _finish(result, json, presentation.merged)


@app.command(epilog="`exporter unmerge artifacts/demo/merged --adapter exporter/demo/adapter --base B --out restored`")
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
    progress = _start(quiet, verbose)
    result = exporter.unmerge(merged, adapter=adapter, out=out, base=base, memory=_size(memory), progress=progress)
    _finish(result, json, presentation.unmerged)


@app.command(epilog="`exporter export artifacts/demo/merged --precision native --precision int8`")
def export(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="A transformers directory with safetensors weights.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="In place of CHECKPOINT, with --adapter.")] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="A directory or a hub id, or NAME=EITHER. Repeat for several.")
    ] = None,
    adapters: Annotated[
        Adapters | None, typer.Option(help="`separate`: a graph over the base, adapters chosen at run time.")
    ] = None,
    precision: Annotated[
        list[ExportPrecision] | None,
        typer.Option(help="Repeat for several; default native. int8-exact takes --base and --adapter."),
    ] = None,
    target: Annotated[list[Target] | None, typer.Option(help="Repeat for several; default cpu.")] = None,
    builder: Annotated[Builder, typer.Option(help="optimum serves architectures without a builder.")] = Builder.native,
    block_size: Annotated[
        int, typer.Option(help="Of int8 and int4: 32 (most exact), 64, 128 (fastest on a CPU) or 256 weights a scale.")
    ] = 32,
    deployment: Annotated[
        list[Deployment] | None,
        typer.Option(help="Files in BUNDLE/deployment that run it elsewhere. Repeat for several."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where int8/, int4/ ... go; default: beside CHECKPOINT.")] = None,
    force: ForceOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Write ONNX graphs with KV-cache: native points into the checkpoint's own weights, the others stream their own."""
    progress = _start(quiet, verbose)
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
    _finish(presentation.Bundles(tuple(bundles)), json, presentation.bundles)


@app.command(epilog="`exporter verify --base B --adapter A --bundle artifacts/demo/merged --report parity`")
def verify(
    base: BaseOption,
    adapter: AdapterOption,
    bundle: Annotated[list[Path], typer.Option(help="A directory made by merge or export. Repeat for several.")],
    weight: WeightOption = None,
    prompts: Annotated[Path | None, typer.Option(help="JSON lines; default: the packaged set.")] = None,
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
    progress = _start(quiet, verbose)
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
    _finish(result, json, presentation.verification)


@app.command(epilog="`exporter capture --base B --adapter A --out reference.safetensors`")
def capture(
    base: BaseOption,
    adapter: AdapterOption,
    out: Annotated[Path, typer.Option(help="The file to write.")],
    weight: WeightOption = None,
    prompts: Annotated[Path | None, typer.Option(help="JSON lines; default: the packaged set.")] = None,
    level: Level = Level.commit,
    template: Annotated[str | None, typer.Option(help="A chat template's name (`alpaca`) or text.")] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Record what the 8-bit PEFT model says, for a machine that cannot run it."""
    progress = _start(quiet, verbose)
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
    _finish(result, json, presentation.captured)


@app.command(epilog="`exporter run recipes/gpt-6.7b-alpaca.toml`")
def run(
    spec: Annotated[Path | None, typer.Argument(help="A run as TOML.")] = None,
    base: Annotated[str | None, typer.Option(help="The base, where there is no spec.")] = None,
    adapter: Annotated[list[str] | None, typer.Option(help="The adapter. Repeat to add several.")] = None,
    out: Annotated[Path | None, typer.Option(help="The directory to write.")] = None,
    precision: Annotated[list[Precision] | None, typer.Option(help="Repeat for several; default native.")] = None,
    target: Annotated[list[Target] | None, typer.Option(help="Repeat for several; default cpu.")] = None,
    template: Annotated[str | None, typer.Option(help="A chat template's name (`alpaca`) or text.")] = None,
    level: Level = Level.commit,
    force: Annotated[bool, typer.Option(help="Redo every stage, and replace what the directory holds.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Merge, export, verify and report. What is done and still true is skipped."""
    progress = _start(quiet, verbose)
    result = exporter.run(
        spec,
        base=base,
        adapter=adapter or None,
        out=out,
        precision=precision or ("native",),
        target=target or ("cpu",),
        template=template,
        level=level.value,
        force=force,
        progress=progress,
    )
    _finish(result, json, presentation.run)


@app.command(epilog="`exporter demo --out artifacts/demo`")
def demo(
    out: Annotated[Path, typer.Option(help="The directory to write.")] = Path("artifacts/demo"),
    level: Level = Level.commit,
    force: Annotated[bool, typer.Option(help="Redo every stage, and replace what the directory holds.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Run everything on the packaged pair: a small trained base and a real LoRA adapter."""
    progress = _start(quiet, verbose)
    result = exporter.demo(out=out, level=level.value, force=force, progress=progress)
    _finish(result, json, presentation.run)


@app.command(epilog='`exporter generate artifacts/demo/merged --instruction "Name three colours."`')
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
    _start(quiet, verbose)
    on_text = (lambda piece: print(piece, end="", flush=True)) if stream and not json else None
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
    _finish(result, json, (lambda generated: "") if on_text else (lambda generated: generated.text))


@app.command(epilog="`exporter verify-manifest artifacts/demo`")
def verify_manifest(
    directory: Annotated[Path, typer.Argument(help="A merged checkpoint, a bundle, or a directory of them.")],
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Hash again every file and tensor that a directory's manifests list: 0 if all are as written, else 4."""
    progress = _start(quiet, verbose)
    _finish(exporter.verify_manifest(directory, progress=progress), json, presentation.manifest_check)


@app.command(epilog="`exporter serve artifacts/demo --port 8000`")
def serve(
    bundle: Annotated[
        list[str],
        typer.Argument(help="DIR or NAME=DIR: a directory with a graph, or one that holds such directories."),
    ],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one and says which.")] = 8000,
    slots: Annotated[int, typer.Option(min=1, help="Streams of a bundle that are computed at once.")] = 16,
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
    _start(quiet, verbose)
    ended = exporter.serve(
        bundle,
        host=host,
        port=port,
        slots=slots,
        queue=queue,
        api_key_file=api_key_file,
        max_body=_size(max_body),
        request_timeout=request_timeout,
        drain_timeout=drain_timeout,
        log_prompts=log_prompts,
        quiet=quiet,
        provider=provider,
        threads=threads,
        on_ready=lambda ready: _finish(ready, json, presentation.ready),
    )
    raise typer.Exit(ended.exit_code)


@app.command(epilog="`exporter doctor --json`")
def doctor(json: JsonOption = False, quiet: QuietOption = False, verbose: VerboseOption = False) -> None:
    """Try what `run` needs: providers, 8-bit layers, memory, disk, the hub."""
    _start(quiet, verbose)
    _finish(exporter.doctor(), json, presentation.diagnosis)


@app.command(name="version")
def print_version() -> None:
    """Print the version."""
    print(exporter.__version__)


def _terminated(*_: object) -> None:
    raise SystemExit(143)


def main() -> None:
    """The console script. Every expected error is one message and its exit code."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code = app(standalone_mode=False)
    except typer.Exit as done:
        code = done.exit_code
    except UsageMessage as error:
        error.show()
        code = UsageError.exit_code
    except (typer.Abort, KeyboardInterrupt):
        print("interrupted: run the same command again to go on", file=sys.stderr)
        code = 130
    except ExporterError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except BrokenPipeError:
        code = 141
    except Exception as error:
        if "-v" in sys.argv or "--verbose" in sys.argv:
            raise
        message = lacking(error) or (
            f"an unexpected {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}\n"
            "what to do: run the command again with -v and report the traceback: this is a bug"
        )
        print(f"error: {message}", file=sys.stderr)
        code = EnvironmentLacking.exit_code
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
