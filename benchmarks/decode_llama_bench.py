"""bench_decode's worker for llama.cpp's own `llama-bench`, where it is on the PATH. `model` is a GGUF file."""

import json
import resource
import statistics
import subprocess
import sys
from typing import Any

from decode_worker import Job


def main() -> None:
    job = Job(**json.load(sys.stdin))
    lengths = [len(ids) for ids in job.prompts]
    prefill = bench(job, ["-n", "0", "-p", ",".join(map(str, lengths))])
    decode = bench(job, ["-p", "0", "-n", str(job.new_tokens), "-d", ",".join(map(str, lengths))])
    result = {
        "load": None,
        "peak": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        "prefill": {row["n_prompt"]: seconds(row) for row in prefill},
        "decode": {row["n_depth"]: seconds(row) / row["n_gen"] for row in decode},
        "tokens": {},
        "weight_bytes": None,
        "slot_bytes": None,
        "version": prefill[0]["build_commit"],
    }
    print("\n" + json.dumps(result))


def bench(job: Job, what: list[str]) -> list[dict[str, Any]]:
    common = ["llama-bench", "-m", job.model, "-t", str(job.threads), "-r", str(job.repeats), "-o", "json"]
    return json.loads(subprocess.run([*common, *what], check=True, stdout=subprocess.PIPE).stdout)


def seconds(row: dict[str, Any]) -> float:
    return statistics.median(row["samples_ns"]) / 1e9


if __name__ == "__main__":
    main()
