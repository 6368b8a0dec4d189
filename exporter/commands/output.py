"""What a command does before and after its work: how much is said, and the result on stdout."""

import json
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

import typer

from exporter.progress import Progress
from exporter.terminal import terminal_progress


def start(quiet: bool, verbose: bool) -> Progress:
    """Progress on stderr, and libraries silent unless asked for."""
    if not verbose:
        warnings.filterwarnings("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        logging.disable(logging.ERROR)
    return terminal_progress(quiet=quiet)


def finish(result: Any, as_json: bool, text: Callable[[Any], str]) -> None:
    """Print the result on stdout and exit with the code it carries."""
    print(json.dumps(result.to_dict(), indent=2, ensure_ascii=False) if as_json else text(result), flush=True)
    code = getattr(result, "exit_code", 0)
    if code:
        raise typer.Exit(code)


def show(piece: str) -> None:
    """A piece of an answer, as it comes."""
    print(piece, end="", flush=True)
