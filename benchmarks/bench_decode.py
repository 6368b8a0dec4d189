"""`make bench-decode`: prefill and decode against llama.cpp, CTranslate2, optimum and transformers, one machine.

    python benchmarks/bench_decode.py --sizes demo 590M --contenders exporter llama.cpp-q8_0 --rounds 3

Every contender is a process of its own over the same weights, prompts and number of threads; a round runs each of them
once, and rounds alternate in direction. Figures are medians over rounds; ratios are medians of a round's ratios. The
peers live in an environment of their own that this script fills with pip; what cannot be had is listed with the reason.
Greedy tokens are compared with transformers'; llama.cpp's, whose gelu is the tanh approximation whatever the
configuration says, with transformers under `gelu_new`.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from contest import make_models, parse_contest, table_lines
from decode_models import CONTENDERS, HERE, ROOT, Missing, Place, make_checkpoint, make_peers, run
from decode_worker import Job
from tokenizers import Tokenizer

# exporter's contender, the peer at the same precision
PAIRS = (
    ("exporter-native", "llama.cpp-f32"),
    ("exporter-int8", "llama.cpp-q8_0"),
    ("exporter-int4", "llama.cpp-q4_0"),
    ("exporter-int8-block128", "llama.cpp-q8_0"),
    ("exporter-int4-block128", "llama.cpp-q4_0"),
    ("exporter-native", "llama-bench-f32"),
    ("exporter-int8", "llama-bench-q8_0"),
    ("exporter-int4", "llama-bench-q4_0"),
    ("exporter-native", "ctranslate2-float32"),
    ("exporter-int8", "ctranslate2-int8"),
    ("exporter-int8-block128", "ctranslate2-int8"),
    ("exporter-native", "optimum-fp32"),
    ("exporter-int8", "optimum-fp32"),
    ("exporter-int8", "optimum-int8"),
    ("exporter-native", "transformers"),
)
EXACT, TANH = "transformers", "transformers with gelu_new"
Result = dict[str, Any]


def main() -> None:
    options = parse()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    failures = make_peers(options.work / "peers", options.wheels)
    for package, reason in failures.items():
        print(f"not installed: {package}: {reason}")
    sizes = []
    for size in options.sizes:
        place = Place(options.work / "decode" / size, options.work / "peers", options.threads)
        sizes.append(measure(place, size, options))
        print(table(sizes[-1]), flush=True)
        if options.remove:
            shutil.rmtree(place.directory)
    machine = {"architecture": platform.machine(), "processor": processor(), "threads": options.threads}
    report = {"machine": machine, "not installed": failures, "sizes": sizes}
    path = options.work / "decode.json"
    path.write_text(json.dumps(report, indent=1))
    print(f"\nall runs: {path}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", nargs="+", default=["demo", "590M", "1.3B"], help="demo, Cerebras-GPT sizes, or WIDTHxLAYERSxHEADS"
    )
    parser.add_argument("--positions", nargs="+", type=int, default=[128, 1024], help="lengths of the prompts")
    parser.add_argument("--new-tokens", type=int, default=32, help="decoded after each prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=1, help="of each prompt in a process")
    parser.add_argument("--work", type=Path, default=ROOT / "build/bench", help="takes 25 bytes a parameter")
    parser.add_argument("--remove", action="store_true", help="remove a size's models when it is measured")
    return parse_contest(parser, CONTENDERS)


def measure(place: Place, size: str, options: argparse.Namespace) -> dict[str, Any]:
    """Every result of every round by contender; the contenders that could not run and why; references; bandwidths."""
    make_checkpoint(place, size)
    job = prompts(place, options)
    models, missing = make_models(place, CONTENDERS, options.chosen)
    rounds: dict[str, list[Result]] = {name: [] for name in models}
    bandwidths = []
    for number in range(options.rounds):
        bandwidths.append(float(run([sys.executable, HERE / "bandwidth.py", str(options.threads)])))
        for name in list(rounds)[:: -1 if number % 2 else 1]:
            if name not in missing:
                print(f"{size}, round {number + 1} of {options.rounds}: {name}", file=sys.stderr)
                try:
                    rounds[name].append(contend(place, name, models[name], job))
                except Missing as error:
                    missing[name] = str(error)
    return {
        "size": size,
        "lengths": [len(ids) for ids in job.prompts],
        "rounds": {name: found for name, found in rounds.items() if name not in missing},
        "missing": missing,
        "references": references(place, job),
        "bandwidths": bandwidths,
    }


def prompts(place: Place, options: argparse.Namespace) -> Job:
    """The beginning of the licence, as long as each position, or as the context has room for."""
    room = json.loads((place.base / "config.json").read_text())["n_positions"] - options.new_tokens
    ids = Tokenizer.from_file(str(place.base / "tokenizer.json")).encode((ROOT / "LICENSE").read_text()).ids
    lengths = sorted({min(position, room) for position in options.positions})
    if lengths[0] < 1 or lengths[-1] > len(ids):
        raise SystemExit(f"positions {lengths}: expected 1 to {len(ids)}")
    return Job("", "", options.threads, [ids[:length] for length in lengths], options.new_tokens, options.repeats)


def contend(place: Place, name: str, model: Path, job: Job) -> Result:
    entry = CONTENDERS[name]
    given = asdict(job) | {"model": str(model), "flavour": entry.flavour}
    return json.loads(run(entry.command(place), json.dumps(given)).splitlines()[-1])


def references(place: Place, job: Job) -> dict[str, dict[str, list[int]]]:
    """transformers' greedy tokens by length, as configured and with the gelu that llama.cpp computes."""
    found = {}
    for name, activation in ((EXACT, ""), (TANH, "gelu_new")):
        given = asdict(job) | {"model": str(place.base), "flavour": activation, "repeats": 1}
        lines = run(CONTENDERS["transformers"].command(place), json.dumps(given)).splitlines()
        found[name] = json.loads(lines[-1])["tokens"]
    return found


def table(found: dict[str, Any]) -> str:
    lengths, rounds = [str(length) for length in found["lengths"]], found["rounds"]
    roofline = statistics.median(found["bandwidths"])
    head = ["contender", *(f"decode at {n}: ms" for n in lengths), *(f"tokens/s at {n}" for n in lengths)]
    head += [*(f"of bandwidth at {n}" for n in lengths), *(f"prefill of {n}: tokens/s" for n in lengths)]
    head += ["load s", "peak GB", "read a token MB", "equal greedy tokens"]
    rows = [cells(name, results, lengths, roofline, found["references"]) for name, results in rounds.items()]
    lines = [f"\n### {found['size']}, read bandwidth {roofline / 1e9:.1f} GB/s\n", *table_lines(head, rows)]
    lines += [f"\nmissing: {name}: {reason}" for name, reason in found["missing"].items()]
    pairs = [pair for pair in PAIRS if all(name in rounds for name in pair)]
    if pairs:
        head = ["times as fast as", *(f"decode at {n}" for n in lengths), *(f"prefill of {n}" for n in lengths)]
        kinds = [(kind, n) for kind in ("decode", "prefill") for n in lengths]
        ratios = [[f"{speedup(rounds[a], rounds[b], kind, n):.2f}" for kind, n in kinds] for a, b in pairs]
        rows = [[f"{a} / {b}", *of] for (a, b), of in zip(pairs, ratios, strict=True)]
        lines += ["", *table_lines(head, rows)]
    return "\n".join(lines)


def cells(
    name: str, results: list[Result], lengths: list[str], roofline: float, references: dict[str, dict[str, list[int]]]
) -> list[str]:
    """One contender's line: medians over its rounds. roofline: bytes a second that this machine can read."""
    decode = [statistics.median(one["decode"][n] for one in results) for n in lengths]
    prefill = [statistics.median(one["prefill"][n] for one in results) for n in lengths]
    load, weights = results[0]["load"], results[0]["weight_bytes"]
    shares = ["-"] * len(lengths)
    if weights is not None:
        read = [weights + int(n) * results[0]["slot_bytes"] for n in lengths]
        shares = [f"{size / time / roofline:.0%}" for size, time in zip(read, decode, strict=True)]
    return [
        name,
        *(f"{1e3 * time:.2f}" for time in decode),
        *(f"{1 / time:.1f}" for time in decode),
        *shares,
        *(f"{int(n) / time:.0f}" for n, time in zip(lengths, prefill, strict=True)),
        "-" if load is None else f"{statistics.median(one['load'] for one in results):.2f}",
        f"{max(one['peak'] for one in results) / 1e9:.2f}",
        "-" if weights is None else f"{weights / 1e6:.0f}",
        agreement(name, results[0], references),
    ]


def speedup(ours: list[Result], peer: list[Result], kind: str, length: str) -> float:
    return statistics.median(b[kind][length] / a[kind][length] for a, b in zip(ours, peer, strict=True))


def agreement(name: str, result: Result, references: dict[str, dict[str, list[int]]]) -> str:
    """How many tokens are the reference's before the first that is not, prompt by prompt."""
    expected = references[TANH if name.startswith("llama") else EXACT]
    counts = []
    for length, tokens in result["tokens"].items():
        same = [a == b for a, b in zip(tokens, expected[length], strict=True)]
        counts.append(f"{([*same, False]).index(False)}/{len(same)}")
    return ", ".join(counts) or "-"


def processor() -> str:
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
