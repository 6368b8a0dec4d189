"""What each contender of bench_decode.py does, in a process of its own and in whatever environment has its library.

A worker reads one Job as JSON from standard input and writes one JSON object as the last line of standard output.
Standard library only: it runs in the peers' environment too.
"""

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Job:
    """Greedy continuation of each prompt by `new_tokens`, `repeats` times. `flavour` is the contender's own word."""

    model: str
    flavour: str
    threads: int
    prompts: list[list[int]]
    new_tokens: int
    repeats: int

    @property
    def context(self) -> int:
        return max(map(len, self.prompts)) + self.new_tokens


class Contender(Protocol):
    """version: of the library. weight_bytes: of the weights, read in a step. slot_bytes: a position's cache."""

    version: str
    weight_bytes: int
    slot_bytes: int

    def prefill(self, ids: list[int]) -> int:
        """Begin anew: the most likely token after `ids`."""
        ...

    def decode(self, token: int) -> int:
        """Append `token`, the one returned last: the most likely token after it."""
        ...


def work(load: Callable[[Job], Contender]) -> None:
    job = Job(**json.load(sys.stdin))
    began = time.perf_counter()
    contender = load(job)
    loaded = time.perf_counter() - began
    continued(contender, job.prompts[0], job.new_tokens)  # warm: first calls allocate; to the end, so none is left over
    prefill: dict[int, list[float]] = {len(ids): [] for ids in job.prompts}
    decode: dict[int, list[float]] = {len(ids): [] for ids in job.prompts}
    tokens: dict[int, list[int]] = {}
    for _ in range(job.repeats):
        for ids in job.prompts:
            tokens[len(ids)], times = continued(contender, ids, job.new_tokens)
            prefill[len(ids)].append(times[0])
            decode[len(ids)].append(statistics.median(times[1:]))
    result = {
        "load": loaded,
        "peak": peak_memory(),
        "prefill": {length: statistics.median(times) for length, times in prefill.items()},
        "decode": {length: statistics.median(times) for length, times in decode.items()},
        "tokens": tokens,
        "weight_bytes": contender.weight_bytes,
        "slot_bytes": contender.slot_bytes,
        "version": contender.version,
    }
    print("\n" + json.dumps(result), flush=True)


def continued(contender: Contender, ids: list[int], new_tokens: int) -> tuple[list[int], list[float]]:
    """The greedy tokens, and the seconds that each took; the first includes the prompt."""
    tokens, times = [], []
    for number in range(new_tokens):
        began = time.perf_counter()
        token = contender.decode(tokens[-1]) if number else contender.prefill(ids)
        times.append(time.perf_counter() - began)
        tokens.append(token)
    return tokens, times


def peak_memory() -> int:
    """Bytes of this process's largest resident set, mapped files included."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent held before it started this process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
