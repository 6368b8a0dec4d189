"""What bench_decode.py and bench_serve.py share: who takes part, with which models, and tables in Markdown."""

import argparse
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from decode_models import Missing, Place


class Contender(Protocol):
    """make: the model of `flavour`, made if it is not there yet; raises Missing."""

    @property
    def make(self) -> Callable[[Place, str], Path]: ...

    @property
    def flavour(self) -> str: ...


def parse_contest(parser: argparse.ArgumentParser, contenders: Iterable[str]) -> argparse.Namespace:
    """The command line's options with `chosen`, the names asked for; the directory `work` is there afterwards."""
    names = list(contenders)
    parser.add_argument("--contenders", nargs="+", default=[""], help=f"names or beginnings: {', '.join(names)}")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--wheels", type=Path, help="a directory of wheels that spares compiling llama-cpp-python")
    options = parser.parse_args()
    options.chosen = [name for name in names if name.startswith(tuple(options.contenders))]
    if not options.chosen:
        parser.error(f"no contender begins with {' or '.join(options.contenders)}")
    options.work.mkdir(parents=True, exist_ok=True)
    return options


def make_models(
    place: Place, contenders: Mapping[str, Contender], chosen: Iterable[str]
) -> tuple[dict[str, Path], dict[str, str]]:
    """The chosen contenders' models, and why others have none."""
    models, missing = {}, {}
    for name in chosen:
        try:
            models[name] = contenders[name].make(place, contenders[name].flavour)
        except Missing as error:
            missing[name] = str(error)
    return models, missing


def table_lines(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Of a table in Markdown."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
