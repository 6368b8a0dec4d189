"""The command line: which commands there are, and what each error prints and exits with. No logic."""

import signal
import sys
import traceback
from typing import Annotated, Any

import typer

import exporter
from exporter.commands import bundles, checkpoints, checks, runs
from exporter.errors import EnvironmentLacking, ExporterError, UsageError, lacking

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

# In the order of the help, each with an example.
COMMANDS = (
    (checkpoints.inspect, "exporter inspect --base exporter/demo/base --adapter exporter/demo/adapter --json"),
    (checkpoints.merge, "exporter merge --base owner/base --adapter owner/adapter --out merged"),
    (
        checkpoints.unmerge,
        "exporter unmerge artifacts/demo/merged --adapter exporter/demo/adapter --base B --out restored",
    ),
    (bundles.export, "exporter export artifacts/demo/merged --precision native --precision int8"),
    (checks.verify, "exporter verify --base B --adapter A --bundle artifacts/demo/merged --report parity"),
    (checks.capture, "exporter capture --base B --adapter A --out reference.safetensors"),
    (runs.run, "exporter run recipes/gpt-6.7b-alpaca.toml"),
    (runs.demo, "exporter demo --out artifacts/demo"),
    (bundles.generate, 'exporter generate artifacts/demo/merged --instruction "Name three colours."'),
    (checks.verify_manifest, "exporter verify-manifest artifacts/demo"),
    (bundles.serve, "exporter serve artifacts/demo --port 8000"),
    (checks.doctor, "exporter doctor --json"),
)
for command, example in COMMANDS:
    app.command(epilog=f"`{example}`")(command)


def _print_and_exit(wanted: bool) -> None:
    if wanted:
        print_version()
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_print_and_exit, is_eager=True, help="Print the version and exit.")
]


@app.callback()
def flags(version: Version = False) -> None:
    """What stands before any command."""


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
            traceback.print_exc()
        message = lacking(error) or (
            f"an unexpected {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}\n"
            "what to do: run the command again with -v and report the traceback: this is a bug"
        )
        print(f"error: {message}", file=sys.stderr)
        code = EnvironmentLacking.exit_code
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
