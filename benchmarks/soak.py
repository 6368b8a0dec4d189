"""`make soak`: a server under everything that clients do, for minutes, and nothing may be wrong at the end.

    python benchmarks/soak.py --minutes 10

Three bundles of the demo pair, one with its adapter apart, are served by `exporter serve` with few slots and a short
queue. Requests arrive at random, in lulls and bursts: whole and streamed, greedy and sampled with a seed, one choice or
three, through both APIs; some go away, some read slowly, some are malformed or too large. Every answer is compared with
what `exporter generate` gives alone, computed beforehand. In the middle the server gets SIGTERM, has to finish what it
accepted, and is started again. Exit code 1 if a token is wrong, a request is lost, stuck or refused without a reason, a
slot is not free at the end, the log tells of an internal error, or memory grows beyond a bound.

Memory: the median of the resident set over the last fifth of a server's life may lie at most GROWTH bytes above that
over the time from a fifth to two fifths, when caches and arenas are warm. A life below a minute is not judged.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from full_size_stages import free_port
from prometheus_client.parser import text_string_to_metric_families
from serve_load import wait_until_ready
from soak_cases import LONGEST_TEXT, MAX_BODY, Bad, Case, bad_requests, make_bundles, make_cases
from soak_clients import Target, Wrong, cancelled, refused, rude, slow, streamed, whole

ROOT = Path(__file__).parents[1]
PROMPTS = ROOT / "exporter/parity/prompts/alpaca.jsonl"
GROWTH = 16_000_000
JUDGED = 60.0  # seconds of a life
SETTLE = 10.0  # seconds until the last streams of clients that went away have left their slots
ENDS = 60.0  # seconds from SIGTERM to the process's end
SLOTS, QUEUE, AT_ONCE = 4, 12, 80
GAPS = (0.5, 0.15, 0.15, 0.05, 0.005)  # mean seconds between two arrivals, drawn anew every few seconds
Client = Callable[[Target, Any, random.Random], Coroutine[Any, Any, str]]
# By name: the client, and how often it comes.
CLIENTS: Mapping[str, tuple[Client, int]] = {
    "streamed": (streamed, 35),
    "whole": (whole, 20),
    "cancelled": (cancelled, 15),
    "slow": (slow, 8),
    "refused": (refused, 16),
    "rude": (rude, 6),
}


@dataclass
class Life:
    """One server from start to end. warm, last, growth: bytes of memory. tokens, files: by its own figures, at the end
    of a life that is not cut short. code: of its exit.
    """

    seconds: float
    warm: float = 0.0
    last: float = 0.0
    tokens: int = 0
    files: int = 0
    code: int | None = None

    @property
    def growth(self) -> float:
        return self.last - self.warm


@dataclass
class Soak:
    """outcomes: by client and what became of it. failures: what must not have happened."""

    cases: Sequence[Case]
    bad: Sequence[Bad]
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    lives: list[Life] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals")
    parser.add_argument("--out", type=Path, default=ROOT / "build/soak.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        bundles = make_bundles(work)
        soak = prepared(bundles)
        for number in range(2):
            chance, log = random.Random(options.seed + number), work / f"server{number}.log"
            asyncio.run(live(soak, bundles, log, 30 * options.minutes, chance, cut_short=number == 0))
    print(table(soak))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    counts = [{"client": client, "outcome": outcome, "count": n} for (client, outcome), n in soak.outcomes.items()]
    lives = [asdict(life) for life in soak.lives]
    options.out.write_text(json.dumps({"outcomes": counts, "lives": lives, "failures": soak.failures}, indent=1))
    return 1 if soak.failures else 0


def prepared(bundles: Mapping[str, Path]) -> Soak:
    rows = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines() if len(line) < LONGEST_TEXT]
    config = json.loads((bundles["demo8"] / "config.json").read_text())
    return Soak(make_cases(bundles, rows, longest=48), bad_requests(config["n_positions"], config["vocab_size"]))


async def live(
    soak: Soak, bundles: Mapping[str, Path], log: Path, seconds: float, chance: random.Random, *, cut_short: bool
) -> None:
    """A server's life under load. cut_short: SIGTERM comes while requests run and arrive, else after the last one."""
    port, life, ending = free_port(), Life(seconds), asyncio.Event()
    samples: list[int] = []
    target = Target(f"http://127.0.0.1:{port}")
    process = start(bundles, port, log)
    try:
        if not wait_until_ready(process, f"{target.address}/readyz"):
            raise SystemExit(f"the server did not start: {log.read_text()[-500:]}")
        files = int(figures(target)["process_open_fds"])
        watching = asyncio.create_task(watch(process.pid, samples))
        arriving = asyncio.create_task(arrive(soak, target, chance, ending))
        await asyncio.sleep(seconds)
        if cut_short:
            target.stopped_at = time.monotonic()
            life.code = await terminated(process)
            ending.set()
            await arriving
        else:
            ending.set()
            await arriving
            await settled(soak, target, life, files)
            target.stopped_at = time.monotonic()
            life.code = await terminated(process)
        watching.cancel()
    finally:
        process.kill()
        process.wait()
    fifth = len(samples) // 5
    if fifth:
        life.warm, life.last = statistics.median(samples[fifth : 2 * fifth]), statistics.median(samples[-fifth:])
    soak.lives.append(life)
    soak.failures += verdict(life, log)


def start(bundles: Mapping[str, Path], port: int, log: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "exporter.cli", "serve", *(f"{name}={place}" for name, place in bundles.items())]
    words += ["--port", str(port), "--slots", str(SLOTS), "--queue", str(QUEUE), "--max-body", str(MAX_BODY)]
    with log.open("wb") as written:
        return subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=written, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )


async def arrive(soak: Soak, target: Target, chance: random.Random, ending: asyncio.Event) -> None:
    """Clients come at random until `ending`; returns when the last of them has gone."""
    names, weights = list(CLIENTS), [often for _, often in CLIENTS.values()]
    running: set[asyncio.Task[None]] = set()
    gap, until = GAPS[0], 0.0
    while not ending.is_set():
        if time.monotonic() > until:
            gap, until = chance.choice(GAPS), time.monotonic() + chance.uniform(1, 5)
        await asyncio.sleep(chance.expovariate(1 / gap))
        if len(running) < AT_ONCE:
            (name,) = chance.choices(names, weights)
            item = chance.choice(soak.bad if name == "refused" else soak.cases)
            task = asyncio.create_task(one(soak, target, name, item, chance))
            running.add(task)
            task.add_done_callback(running.discard)
    await asyncio.gather(*running)


async def one(soak: Soak, target: Target, name: str, item: Any, chance: random.Random) -> None:
    client, _ = CLIENTS[name]
    try:
        outcome = await client(target, item, chance)
    except Wrong as error:
        outcome = "WRONG"
        soak.failures.append(f"{name}: {error}")
    except Exception as error:  # what surprises a client is a finding too
        outcome = "WRONG"
        soak.failures.append(f"{name}: {type(error).__name__}: {error}")
    soak.outcomes[name, outcome] += 1


async def watch(pid: int, samples: list[int]) -> None:
    """The resident set of the server and its children, in bytes, twice a second."""
    with suppress(psutil.Error):
        server = psutil.Process(pid)
        while True:
            samples.append(sum(one.memory_info().rss for one in (server, *server.children(recursive=True))))
            await asyncio.sleep(0.5)


async def terminated(process: subprocess.Popen[bytes]) -> int | None:
    """Send SIGTERM; the exit code, or None after ENDS seconds."""
    process.send_signal(signal.SIGTERM)
    until = time.monotonic() + ENDS
    while process.poll() is None and time.monotonic() < until:
        await asyncio.sleep(0.05)
    return process.returncode


async def settled(soak: Soak, target: Target, life: Life, files: int) -> None:
    """All clients have gone: after at most SETTLE seconds every slot is free, the queue empty, every socket closed."""
    until = time.monotonic() + SETTLE
    while True:
        now = figures(target)
        held = {name: now[name] for name in ("exporter_slots_running", "exporter_queue_requests") if now[name]}
        if now["process_open_fds"] > files:
            held["open files beyond those at the start"] = now["process_open_fds"] - files
        if not held or time.monotonic() > until:
            break
        await asyncio.sleep(0.2)
    life.tokens, life.files = int(now["exporter_generated_tokens_total"]), int(now["process_open_fds"])
    if held:
        soak.failures.append(f"after the last client something is still held: {held}")
    if now["exporter_engine_failures_total"]:
        soak.failures.append(f"{now['exporter_engine_failures_total']:.0f} streams ended with an error")


def figures(target: Target) -> Mapping[str, float]:
    """The server's own figures by name, summed over the bundles."""
    found: defaultdict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(httpx.get(f"{target.address}/metrics", timeout=30).text):
        for sample in family.samples:
            found[sample.name] += sample.value
    return found


def verdict(life: Life, log: Path) -> list[str]:
    """What is wrong with a life, by its exit, its memory and its log."""
    found = []
    if life.code != 143:
        found.append(f"the server ended with {life.code}; expected: 143 after SIGTERM")
    if life.seconds >= JUDGED and life.growth > GROWTH:
        found.append(f"memory grew by {life.growth / 1e6:.1f} MB; expected: at most {GROWTH / 1e6:.0f} MB")
    for line in log.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            found.append(f"the log: {line[:300]}")
            continue
        if entry["level"] == "error" or entry["event"] == "drain_timeout":
            found.append(f"the log: {line[:300]}")
    return found


def table(soak: Soak) -> str:
    lines = ["| client | outcome | requests |", "|---|---|---|"]
    lines += [f"| {client} | {outcome} | {n} |" for (client, outcome), n in sorted(soak.outcomes.items())]
    lines += ["", "| life | seconds | exit | memory MB: warm | last | growth | tokens | open files |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for number, life in enumerate(soak.lives, 1):
        memory = [f"{size / 1e6:.1f}" for size in (life.warm, life.last, life.growth)]
        cells = [number, f"{life.seconds:.0f}", life.code, *memory, life.tokens or "-", life.files or "-"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    total = soak.outcomes.total()
    lines.append(f"\n{total} requests, {len(soak.cases)} answers known beforehand, {len(soak.failures)} failures")
    lines += [f"- {failure}" for failure in soak.failures[:20]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
