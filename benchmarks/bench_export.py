"""`make bench-export`: what quantizing costs beyond reading a checkpoint and writing, and hashing, what comes out.

    python benchmarks/bench_export.py --size 6.7B --precisions int8 int4 --runs 3
    python benchmarks/bench_export.py --checkpoint DIR

Without a checkpoint a random base is made and merged first. One that no manifest describes is hashed by each export.
Each round exports, then does what no export can leave out (`read_write.py`): every byte of the checkpoint read once, as
many bytes written as the export wrote, and hashed twice, by tensor for the manifest's list and as one file. All from
a warm page cache, as far as the checkpoint fits into it. "Beyond" is the median over rounds of one round's difference.
"""

import argparse
import shutil
import statistics
import sys
from pathlib import Path

from bench_merge import ROOT, make_pair
from measure import Run, read_all, run

from exporter.graph.weights import WEIGHTS
from exporter.manifest import MANIFEST

HERE = Path(__file__).parent
HASHES = {"read and write": 0, "read, write and hash": 2}
Rounds = dict[str, list[Run]]


def main() -> None:
    options = parse()
    checkpoint = options.checkpoint or make_merged(options.work, options.size)
    for precision in options.precisions:
        print(table(precision, measure(checkpoint, options.work, precision, options.runs)), flush=True)
    if not options.checkpoint and not options.keep:
        shutil.rmtree(checkpoint)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="6.7B", help="a Cerebras-GPT size, of which a random pair is made")
    parser.add_argument("--checkpoint", type=Path, help="this one instead")
    parser.add_argument("--precisions", nargs="+", default=["int8", "int4"], choices=["fp32", "fp16", "int8", "int4"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--work", type=Path, default=ROOT / "build/bench", help="needs 2.2 times the base's size")
    parser.add_argument("--keep", action="store_true", help="keep the merged checkpoint")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    return options


def make_merged(work: Path, size: str) -> Path:
    """A merged random checkpoint, made once, without the base that it came from."""
    merged = work / f"merged-{size}"
    if not (merged / MANIFEST).exists():
        pair = make_pair(work, size, "safetensors")
        sources: list[str | Path] = ["--base", pair / "base", "--adapter", pair / "adapter", "--out", merged]
        run([sys.executable, "-m", "exporter.cli", "merge", "--quiet", "--force", *sources])
        shutil.rmtree(pair)
    return merged


def measure(checkpoint: Path, work: Path, precision: str, runs: int) -> Rounds:
    """Every run by command; the first of each is in the same round as the first of the others."""
    sources = sorted(checkpoint.glob("*.safetensors"))
    bundle, copy = work / "exported", work / "written"
    export = [sys.executable, "-m", "exporter.cli", "export", checkpoint, "--precision", precision, "--quiet"]
    rounds: Rounds = {"export": [], **{name: [] for name in HASHES}}
    try:
        for _ in range(runs):
            read_all(sources)
            rounds["export"].append(run([*export, "--out", bundle]))
            size = next(bundle.rglob(WEIGHTS)).stat().st_size
            shutil.rmtree(bundle)
            for name, hashes in HASHES.items():
                read_all(sources)
                rounds[name].append(
                    run([sys.executable, HERE / "read_write.py", copy, str(size), str(hashes), *sources])
                )
                copy.unlink()
    finally:
        shutil.rmtree(bundle, ignore_errors=True)
        copy.unlink(missing_ok=True)
    return rounds


def table(precision: str, rounds: Rounds) -> str:
    lines = [f"\n{precision}", "| command | wall s | CPU s | peak memory |", "|---|---|---|---|"]
    for name, found in rounds.items():
        peak = max(one.peak for one in found) / 1e6
        lines.append(f"| {name} | {median(found, 'wall'):.1f} | {median(found, 'cpu'):.1f} | {peak:.0f} MB |")
    for name in HASHES:
        lines.append(
            f"| export beyond: {name} | {beyond(rounds, name, 'wall'):.1f} | {beyond(rounds, name, 'cpu'):.1f} | |"
        )
    return "\n".join(lines)


def median(runs: list[Run], key: str) -> float:
    return statistics.median(getattr(one, key) for one in runs)


def beyond(rounds: Rounds, name: str, key: str) -> float:
    pairs = zip(rounds["export"], rounds[name], strict=True)
    return statistics.median(getattr(one, key) - getattr(other, key) for one, other in pairs)


if __name__ == "__main__":
    main()
