"""`make bench-merge`: merging against copying the files and against PEFT, in pairs, cold and warm.

    python benchmarks/bench_merge.py --sizes 1.3B 6.7B --formats safetensors bin --runs 3

Each round runs `cp -r`, the merge without proof, the merge as it is by default, and (in the first `--peft-runs` rounds)
PEFT, each from the same state of the page cache. Ratios are medians over rounds of one round's wall times.
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from measure import Run, drop_page_cache, median_ratio, read_all, run

HERE = Path(__file__).parent
ROOT = HERE.parent


def main() -> None:
    options = parse()
    results = []
    for size in options.sizes:
        for form in options.formats:
            pair = make_pair(options.work, size, form)
            for state in options.states:
                rows = measure(pair, options.work, state, options.runs, options.peft_runs)
                results.append({"size": size, "format": form, "cache": state, "rows": rows})
                print(table(results[-1]), flush=True)
            if not options.keep:
                shutil.rmtree(pair)
    report = {"machine": f"{platform.machine()}, {platform.processor() or 'unknown'}", "results": results}
    path = options.work / "merge.json"
    path.write_text(json.dumps(report, indent=1))
    print(f"all runs: {path}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["1.3B", "6.7B"], help="Cerebras-GPT sizes")
    parser.add_argument("--formats", nargs="+", default=["safetensors", "bin"], choices=["safetensors", "bin"])
    parser.add_argument("--states", nargs="+", default=["warm", "cold"], choices=["warm", "cold"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--peft-runs", type=int, default=1, help="rounds that run PEFT too; it takes minutes")
    parser.add_argument("--work", type=Path, default=ROOT / "build/bench", help="needs three times the base's size")
    parser.add_argument("--keep", action="store_true", help="keep the generated base")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    return options


def make_pair(work: Path, size: str, form: str) -> Path:
    """A random base of a Cerebras-GPT shape in float16 and its adapter, made once."""
    pair = work / f"pair-{size}-{form}"
    if not (pair / "adapter/adapter_config.json").exists():
        shutil.rmtree(pair, ignore_errors=True)
        command = [sys.executable, HERE / "make_base.py", "--size", size, "--random", "--format", form, "--out", pair]
        subprocess.run(command, check=True)
    return pair


def measure(pair: Path, work: Path, state: str, runs: int, peft_runs: int) -> dict[str, list[dict[str, float]]]:
    """Wall, CPU and peak memory of every run by command."""
    base, adapter, out = pair / "base", pair / "adapter", work / "out"
    exporter = [sys.executable, "-m", "exporter.cli", "merge", "--quiet", "--base", base, "--adapter", adapter]
    commands: dict[str, list[str | Path]] = {
        "cp -r": ["cp", "-r", base, out],
        "merge --proof none": [*exporter, "--out", out, "--proof", "none"],
        "merge": [*exporter, "--out", out],
        "PEFT": [sys.executable, HERE / "peft_merge.py", base, adapter, out],
    }
    prepare = prepared(sorted(base.iterdir()), state)
    measured: dict[str, list[Run]] = {name: [] for name in commands}
    run(commands["cp -r"])  # not counted: a virtual machine is slow where it touches memory for the first time
    for number in range(runs):
        for name, command in commands.items():
            if name == "PEFT" and number >= peft_runs:
                continue
            shutil.rmtree(out, ignore_errors=True)
            prepare()
            measured[name].append(run(command))
    shutil.rmtree(out, ignore_errors=True)
    return {name: [asdict(one) for one in found] for name, found in measured.items()}


def prepared(files: list[Path], state: str) -> Callable[[], object]:
    return (lambda: drop_page_cache(files)) if state == "cold" else (lambda: read_all(files))


def table(result: dict) -> str:
    lines = [
        f"\n{result['size']} {result['format']}, {result['cache']} cache",
        "| command | wall s (median) | x cp | CPU s | peak memory |",
        "|---|---|---|---|---|",
    ]
    rows = {name: [Run(**one) for one in found] for name, found in result["rows"].items()}
    for name, found in rows.items():
        if found:
            ratio = median_ratio(found, rows["cp -r"][: len(found)])
            wall, cpu = (statistics.median(getattr(one, key) for one in found) for key in ("wall", "cpu"))
            peak = max(one.peak for one in found)
            lines.append(f"| {name} | {wall:.1f} | {ratio:.2f} | {cpu:.1f} | {peak / 1e9:.2f} GB |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
