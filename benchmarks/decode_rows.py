"""What a decode step costs by its number of rows, and in which kernels: the bound on what batching can gain.

    python benchmarks/decode_rows.py BUNDLE [--rows 1 2 4 8 16] [--position 100] [--threads 2]

The graph alone, without scheduler, sampling or HTTP; medians. "times one row" compares tokens a second. Kernel times
are ONNX Runtime's own, of a second session that records them: each node's least of all runs, summed by operator.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime as ort

from exporter.runtime.load import load
from exporter.runtime.runner import Runner

STEPS, WARM, SHOWN = 12, 2, 5
Kernels = dict[str, float]  # milliseconds by operator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--position", type=int, default=100, help="tokens that each row holds already")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    times = run_steps(load(options.bundle, threads=options.threads), options.rows, options.position)
    kernels = record_kernels(options.bundle, options.threads, options.rows, options.position)
    shown = sorted(kernels[-1], key=kernels[-1].__getitem__, reverse=True)[:SHOWN]
    print_row(["rows", "step ms", "tokens/s", "times one row", *(f"{name} ms" for name in shown)])
    print_row(["---"] * (4 + len(shown)))
    for rows, took, of in zip(options.rows, times, kernels, strict=True):
        ratio = rows / took * times[0] / options.rows[0]
        parts = (f"{of.get(name, 0.0):.1f}" for name in shown)
        print_row([str(rows), f"{1e3 * took:.1f}", f"{rows / took:.1f}", f"{ratio:.2f}", *parts])


def run_steps(runner: Runner, counts: Sequence[int], position: int) -> list[float]:
    """Seconds of a step for each number of rows: the median of STEPS after WARM more."""
    random = np.random.default_rng(0)
    cache = runner.new_cache(max(counts), position + 1)
    for row in range(max(counts)):
        runner.prefill(cache, row, random.integers(0, runner.vocab_size, position).tolist())
    found = []
    for count in counts:
        times = []
        for _ in range(WARM + STEPS):
            cache.lengths[:] = position
            ids = random.integers(0, runner.vocab_size, (count, 1))
            began = time.perf_counter()
            runner.append(cache, 0, ids)
            times.append(time.perf_counter() - began)
        found.append(statistics.median(times[WARM:]))
    return found


def record_kernels(bundle: Path, threads: int, counts: Sequence[int], position: int) -> list[Kernels]:
    """For each number of rows, from ONNX Runtime's profile of the same steps."""
    with tempfile.TemporaryDirectory() as scratch:
        recording = ort.SessionOptions()
        recording.enable_profiling, recording.profile_file_prefix = True, f"{scratch}/profile"
        with mock.patch.object(ort, "SessionOptions", return_value=recording):  # `load` has no switch for it
            runner = load(bundle, threads=threads)
        run_steps(runner, counts, position)
        events = json.loads(Path(runner._session.end_profiling()).read_text())  # pyright: ignore[reportPrivateUsage]
    nodes = sorted((one for one in events if one["name"].endswith("_kernel_time")), key=lambda one: one["ts"])
    runs = sorted((one for one in events if one["name"] == "model_run"), key=lambda one: one["ts"])
    each = WARM + STEPS
    steps = runs[-each * len(counts) :]
    return [least(nodes, steps[i * each + WARM : (i + 1) * each]) for i in range(len(counts))]


def least(nodes: list[dict[str, Any]], runs: list[dict[str, Any]]) -> Kernels:
    best: dict[tuple[str, str], int] = {}  # microseconds by operator and node
    for run in runs:
        for node in nodes:
            if run["ts"] <= node["ts"] < run["ts"] + run["dur"]:
                key = (node["args"]["op_name"], node["name"])
                best[key] = min(node["dur"], best.get(key, node["dur"]))
    found: defaultdict[str, float] = defaultdict(float)
    for (operator, _), took in best.items():
        found[operator] += took / 1e3
    return dict(found)


def print_row(cells: Sequence[str]) -> None:
    print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
