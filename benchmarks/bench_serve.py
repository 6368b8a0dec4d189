"""`make bench-serve`: many streams at once against llama-cpp-python's server and llama.cpp's own, one machine.

    python benchmarks/bench_serve.py --sizes demo 590M --contenders exporter-int8 llama_cpp.server-q8_0 --streams 1 8

Every server works on the same weights with the same bits and threads, and is asked by the same client: so many streams
at once, each with one Alpaca prompt of the packaged set after the other, greedy, streamed. No prompt comes twice. A
round starts each server anew for each number of streams, and rounds alternate in direction. Figures are medians over
rounds; ratios are medians of a round's ratios. Time per token is the time between two pieces of an answer. Memory is
the largest resident set of the server's processes, mapped files included. What cannot be had is listed with the reason.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from contest import make_models, parse_contest, table_lines
from decode_models import ROOT, Missing, Place, make_checkpoint, make_peers
from full_size_stages import free_port
from process_figures import measure
from serve_load import Load, ask_and_stop
from serve_servers import SERVER_PEERS, SERVERS, Start
from tokenizers import Tokenizer

from exporter.prompts import ALPACA, render_instruction

PROMPTS = ROOT / "exporter/parity/prompts/alpaca.jsonl"
PAIRS = (
    ("exporter-int8", "llama_cpp.server-q8_0"),
    ("exporter-int8", "llama-server-q8_0"),
    ("exporter-int8-block128", "llama_cpp.server-q8_0"),
    ("exporter-int8-block128", "llama-server-q8_0"),
    ("exporter-int4", "llama_cpp.server-q4_0"),
    ("exporter-int4", "llama-server-q4_0"),
    ("exporter-int4-block128", "llama_cpp.server-q4_0"),
    ("exporter-int4-block128", "llama-server-q4_0"),
)
STOPPED = (0, 143, -15)  # exit codes after SIGTERM


@dataclass(frozen=True)
class Figures:
    """Of one server under one number of streams. rate: tokens a second. Times: milliseconds. peak: bytes."""

    rate: float
    first_p50: float
    first_p99: float
    gap_p99: float
    peak: int
    tokens: int
    seconds: float


Rounds = dict[str, dict[int, list[Figures]]]  # by contender and number of streams


def main() -> None:
    options = parse()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.environ["PYTHONPATH"] = str(ROOT)
    failures = make_peers(options.work / "peers", options.wheels, SERVER_PEERS)
    for package, reason in failures.items():
        print(f"not installed: {package}: {reason}")
    sizes = []
    for size in options.sizes:
        found, missing = measure_size(size, options)
        print(table(size, found, missing), flush=True)
        sizes.append({"size": size, "rounds": plain(found), "missing": missing})
    machine = {"architecture": platform.machine(), "threads": options.threads}
    report = {"machine": machine, "new tokens": options.new_tokens, "not installed": failures, "sizes": sizes}
    path = options.work / "serve.json"
    path.write_text(json.dumps(report, indent=1))
    print(f"\nall runs: {path}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["demo", "590M"], help="as of bench_decode.py")
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 4, 8, 16], help="at once")
    parser.add_argument("--requests", type=int, default=2, help="of each stream; one stream alone asks twice as often")
    parser.add_argument("--new-tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=ROOT / "build/bench", help="models are shared with bench_decode")
    return parse_contest(parser, SERVERS)


def measure_size(size: str, options: argparse.Namespace) -> tuple[Rounds, dict[str, str]]:
    """Every round's figures, and why contenders could not take part."""
    place = Place(options.work / "decode" / size, options.work / "peers", options.threads)
    make_checkpoint(place, size)
    models, missing = make_models(place, SERVERS, options.chosen)
    context = json.loads((place.base / "config.json").read_text())["n_positions"]
    given = prompts(place.base, context - options.new_tokens)
    found: Rounds = {name: {streams: [] for streams in options.streams} for name in models}
    for number in range(options.rounds):
        for name in list(models)[:: -1 if number % 2 else 1]:
            for streams in options.streams:
                if name in missing:
                    break
                print(f"{size}, round {number + 1} of {options.rounds}: {name}, {streams} streams", file=sys.stderr)
                start = Start(place, models[name], free_port(), streams, context)
                try:
                    found[name][streams].append(contend(name, start, given, options))
                except Missing as error:
                    missing[name] = str(error)
    return {name: of for name, of in found.items() if name not in missing}, missing


def prompts(base: Path, longest: int) -> list[str]:
    """The packaged instructions under the alpaca template, those of at most `longest` tokens."""
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    rows = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    rendered = [render_instruction(ALPACA, row["instruction"], row["input"]) for row in rows]
    return [text for text in rendered if len(tokenizer.encode(text).ids) <= longest]


def contend(name: str, start: Start, given: list[str], options: argparse.Namespace) -> Figures:
    """One server's life under so many streams. Missing with its last words if it cannot."""
    server, streams = SERVERS[name], start.streams
    each = options.requests * (2 if streams == 1 else 1)
    if streams * each + 1 > len(given):
        raise SystemExit(f"{streams} streams of {each} requests: there are {len(given)} prompts, and none comes twice")
    shares = [given[1 + number : 1 + streams * each : streams] for number in range(streams)]
    body = {"max_tokens": options.new_tokens, "temperature": 0, **server.extra}
    address = f"http://127.0.0.1:{start.port}"
    loads: list[Load | None] = []

    def meanwhile(process: subprocess.Popen[bytes]) -> None:
        loads.append(ask_and_stop(process, address, server.ready, shares, given[0], body))

    with tempfile.TemporaryDirectory(dir=options.work) as scratch:
        directory = Path(scratch)
        try:
            ended = measure(server.command(start), directory=directory, scratch=directory, meanwhile=meanwhile)
        except (RuntimeError, httpx.HTTPError) as error:
            raise Missing(f"with {streams} streams: {error or type(error).__name__}") from error
    if loads[0] is None or ended.code not in STOPPED:
        raise Missing(f"the server ended with {ended.code}: {' '.join(ended.error.split())[-300:]}")
    return figures(loads[0], ended.figures.peak)


def figures(load: Load, peak: int) -> Figures:
    firsts = [1e3 * answer.first for answer in load.answers]
    gaps = [1e3 * gap for answer in load.answers for gap in answer.gaps]
    return Figures(
        rate=load.tokens / load.seconds,
        first_p50=float(np.percentile(firsts, 50)),
        first_p99=float(np.percentile(firsts, 99)),
        gap_p99=float(np.percentile(gaps, 99)) if gaps else 0.0,
        peak=peak,
        tokens=load.tokens,
        seconds=load.seconds,
    )


def table(size: str, found: Rounds, missing: dict[str, str]) -> str:
    head = ["server", "streams", "tokens/s", "first token ms: p50", "p99", "per token ms: p99", "peak GB", "tokens"]
    rows = [cells(name, streams, rounds) for name, of in found.items() for streams, rounds in of.items()]
    lines = [f"\n### {size}\n", *table_lines(head, rows)]
    lines += [f"\nmissing: {name}: {reason}" for name, reason in missing.items()]
    counts = next(iter(found.values()), {})
    if 1 in counts and len(counts) > 1:
        head = ["times one stream", *(str(streams) for streams in counts if streams != 1)]
        ratios = {name: [ratio(of[streams], of[1]) for streams in of if streams != 1] for name, of in found.items()}
        lines += ["", *table_lines(head, ratio_rows(ratios))]
    pairs = [pair for pair in PAIRS if all(name in found for name in pair)]
    if pairs:
        head = ["times as fast, by streams", *map(str, counts)]
        ratios = {f"{a} / {b}": [ratio(found[a][streams], found[b][streams]) for streams in counts] for a, b in pairs}
        lines += ["", *table_lines(head, ratio_rows(ratios))]
    return "\n".join(lines)


def cells(name: str, streams: int, rounds: list[Figures]) -> list[str]:
    rate, *times = (
        statistics.median(getattr(one, field) for one in rounds)
        for field in ("rate", "first_p50", "first_p99", "gap_p99")
    )
    peak = max(one.peak for one in rounds)
    return [
        name,
        str(streams),
        f"{rate:.1f}",
        *(f"{time:.0f}" for time in times),
        f"{peak / 1e9:.2f}",
        str(rounds[0].tokens),
    ]


def ratio_rows(ratios: dict[str, list[float]]) -> list[list[str]]:
    return [[name, *(f"{one:.2f}" for one in of)] for name, of in ratios.items()]


def ratio(ours: list[Figures], others: list[Figures]) -> float:
    return statistics.median(one.rate / other.rate for one, other in zip(ours, others, strict=True))


def plain(found: Rounds) -> dict[str, Any]:
    return {
        name: {str(streams): [asdict(one) for one in rounds] for streams, rounds in of.items()}
        for name, of in found.items()
    }


if __name__ == "__main__":
    main()
