"""`make full-size`: every stage on a base of the first user's own size and layout, with what each takes.

    python benchmarks/full_size.py --size 6.7B            # about 42 GB of disk
    python benchmarks/full_size.py --size 111M            # the same, small

The base is the trained demo pair, widened (`make_base.py --from-demo`): sharded pytorch_model-*.bin in float16, with
the buffers of 2023. Each stage is a process of its own. A finished stage counts while it would be asked the same of
the same bytes and its outputs are as it left them; one that was interrupted is made again whole, so that its figures
are of a whole run. `verify` alone goes on from its logits, and says that its figures are of the last part. Exit codes:
0, 1 over a budget or a stage that failed, else what `verify` gave (1 or 3), 2 usage, 5 too little disk, 130 and 143.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import make_base
import psutil
from bench_decode import processor
from disk_plan import DiskPlan, plan_disk
from full_size_stages import BUNDLES, Stage, ask_and_stop, free_port, stages, without
from process_figures import measure

from exporter.errors import ExporterError
from exporter.files import human_bytes, lock_directory, require_free_space, write_atomically
from exporter.manifest import file_is_unchanged, versions
from exporter.spec import parse_size

ROOT = Path(__file__).parents[1]
STATE = "state.json"
Record = dict[str, Any]


def main() -> None:
    options = parse()
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code = run(options)
    except ExporterError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        code = 130
    sys.exit(code)


def _terminated(*_: object) -> None:
    raise SystemExit(143)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["demo", *make_base.SIZES], default="6.7B", help="demo: 128x12, for trying")
    parser.add_argument("--work", type=Path, default=ROOT / "build/full-size", help="where everything is written")
    parser.add_argument("--report", type=Path, help="where the tables go; default: --work")
    parser.add_argument("--shard-size", default="10GB", help="of the base: what transformers used in 2023")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--skip", nargs="+", default=[], help="stages to leave out, such as verify")
    parser.add_argument(
        "--verify", nargs="+", default=list(BUNDLES), choices=BUNDLES, help="the bundles that verify takes"
    )
    parser.add_argument("--budget", nargs="+", default=[], help="STAGE=SIZE instead of its own, such as merge=600MB")
    parser.add_argument("--keep", action="store_true", help="leave the models and what is recorded of them")
    options = parser.parse_args()
    options.work, options.report = options.work.absolute(), (options.report or options.work).absolute()
    options.stages = stages(shape_arguments(options.size), options.shard_size, options.new_tokens, options.verify)
    known = {stage.name for stage in options.stages}
    try:
        options.budget = {name: parse_size(size) for name, size in (one.split("=") for one in options.budget)}
    except ValueError as error:
        parser.error(f"--budget: {error}")
    if unknown := sorted({*options.skip, *options.budget} - known):
        parser.error(f"no stage {', '.join(unknown)}: they are {', '.join(sorted(known))}")
    return options


def shape_arguments(size: str) -> tuple[str, ...]:
    return ("--width", "128", "--layers", "12", "--heads", "4") if size == "demo" else ("--size", size)


def run(options: argparse.Namespace) -> int:
    plans = disk_plans(options.size)
    options.work.mkdir(parents=True, exist_ok=True)
    with lock_directory(options.work):
        missing = max(0, plans["float16"].total - used(options.work))
        require_free_space(options.work, missing, f"a full-size run of {options.size}")
        records: dict[str, Record] = {}
        for stage in options.stages:
            records[stage.name] = take(stage, options, records)
            write_tables(options, plans, records)
        if not options.keep and all(record["state"] != "failed" for record in records.values()):
            clean(options)
    over = [name for name, record in records.items() if record.get("within") is False]
    failed = [name for name, record in records.items() if record["state"] == "failed"]
    for name in over:
        print(f"{name}: over its budget", file=sys.stderr)
    for name in failed:
        print(f"{name}: {records[name]['note']}", file=sys.stderr)
    return 1 if over or failed else max(record.get("code", 0) for record in records.values())


def disk_plans(size: str) -> dict[str, DiskPlan]:
    """What the run needs with a base in float16, as it is made here, and with one in float32."""
    chosen = make_base.Shape(128, 12, 4) if size == "demo" else make_base.nearest_demo_shape(make_base.SIZES[size])
    shapes = make_base.tensor_shapes(chosen)
    mask = make_base.POSITIONS**2 * chosen.layers
    return {
        name: plan_disk(shapes, width, mask, make_base.VOCABULARY) for name, width in (("float16", 2), ("float32", 4))
    }


def take(stage: Stage, options: argparse.Namespace, records: Mapping[str, Record]) -> Record:
    """The record of a stage: an earlier one that still holds, or a new one of running it."""
    if stage.name in options.skip:
        return {"state": "left out", "note": "left out by --skip"}
    for name in stage.reads:
        if records[name]["state"] != "done":
            return {"state": "left out", "note": f"needs {name}"}
    if stage.serves and (reason := without("serve")):
        return {"state": "left out", "note": reason}
    request = {
        # Another checkout asks the same.
        "command": [word.removeprefix(f"{ROOT}/") for word in stage.command if word != sys.executable],
        "reads": {path: entry["sha256"] for name in stage.reads for path, entry in records[name]["outputs"].items()},
    }
    budget = options.budget.get(stage.name, stage.budget)
    done = recorded(options.work).get(stage.name)
    if done is None or not holds(done, request, options.work):
        print(f"{stage.name}: running", file=sys.stderr, flush=True)
        done = execute(stage, options.work, request)
        if done["state"] == "done":
            everything = recorded(options.work) | {stage.name: done}
            write_atomically(options.work / STATE, json.dumps(everything, indent=1).encode())
    else:
        print(f"{stage.name}: done before, unchanged", file=sys.stderr, flush=True)
    within = done["figures"]["peak"] <= budget if budget and done["state"] == "done" else None
    return {**done, "budget": budget, "within": within}


def recorded(work: Path) -> dict[str, Record]:
    try:
        return json.loads((work / STATE).read_bytes())
    except (OSError, ValueError):
        return {}  # nothing is recorded: everything is made


def holds(record: Record, request: Mapping[str, Any], work: Path) -> bool:
    """True if the stage was asked the same of the same bytes, and all that it wrote is as it left it."""
    return record["request"] == request and all(
        file_is_unchanged(work / path, entry) for path, entry in record["outputs"].items()
    )


def execute(stage: Stage, work: Path, request: Mapping[str, Any]) -> Record:
    for name in stage.removes:
        shutil.rmtree(work / name, ignore_errors=True)
    scratch = work / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    resumed = bool(stage.keeps) and (work / stage.keeps).exists()
    port, said, load = free_port(), [], os.getloadavg()[0]
    ended = measure(
        [word.format(port=port) for word in stage.command],
        environment={"TMPDIR": str(scratch), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        directory=work,
        scratch=scratch,
        meanwhile=(lambda process: said.append(ask_and_stop(process, port))) if stage.serves else None,
    )
    shutil.rmtree(scratch)
    fine = (0, 143) if stage.serves else (0, *stage.verdicts)
    if ended.code not in fine or said == [""]:
        line = next(iter(ended.error.strip().splitlines()[:1]), "no message")
        return {"state": "failed", "note": f"exit code {ended.code}: {line}", "figures": asdict(ended.figures)}
    note = "figures of the last part, after an interruption; " if resumed else ""
    note += said[0] if said else stage.show(ended.out) if stage.show else ""
    return {
        "state": "done",
        "note": note,
        "code": 0 if stage.serves else ended.code,
        "request": dict(request),
        "outputs": stage.outputs(work),
        "figures": asdict(ended.figures),
        "disk": used(work),
        "load_before": load,
        "commit": commit(),
    }


def used(work: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in work.rglob("*") if path.is_file())


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def clean(options: argparse.Namespace) -> None:
    """Everything but the report."""
    for path in options.work.iterdir():
        if path.is_dir() and path.name in ("pair", "merged", "int8", "int4", "scratch", "logits"):
            shutil.rmtree(path)
    (options.work / STATE).unlink(missing_ok=True)


def write_tables(options: argparse.Namespace, plans: Mapping[str, DiskPlan], records: Mapping[str, Record]) -> None:
    memory = psutil.virtual_memory().total
    machine = f"{processor()}, {len(os.sched_getaffinity(0))} cores, {human_bytes(memory)}, Linux {platform.release()}"
    result = {
        "size": options.size,
        "machine": machine,
        "versions": versions(),
        "disk": {name: asdict(plan) | {"total": plan.total} for name, plan in plans.items()},
        "stages": {name: {k: v for k, v in one.items() if k != "outputs"} for name, one in records.items()},
    }
    options.report.mkdir(parents=True, exist_ok=True)
    write_atomically(options.report / f"full-size-{options.size}.json", json.dumps(result, indent=1).encode())
    text = tables(options.size, machine, plans, records)
    write_atomically(options.report / f"full-size-{options.size}.md", text.encode())
    if len(records) == len(options.stages):
        print(text)


HEAD = ("stage", "wall s", "CPU s", "peak RSS", "budget", "", "read", "written", "from disk", "to disk", "disk after")


def tables(size: str, machine: str, plans: Mapping[str, DiskPlan], records: Mapping[str, Record]) -> str:
    lines = [f"## {size} end to end", "", machine, "", row(HEAD), row(["---"] * len(HEAD))]
    for name, record in records.items():
        if record["state"] != "done":
            lines.append(row([name, f"{record['state']}: {record['note']}", *[""] * (len(HEAD) - 2)]))
            continue
        took, budget = record["figures"], record["budget"]
        word = {True: "within", False: "**over**", None: ""}[record["within"]]
        moved = [human_bytes(took[key]) for key in ("read", "written", "from_disk", "to_disk")]
        peak, allowed = human_bytes(took["peak"]), human_bytes(budget) if budget else ""
        cells = [name, f"{took['wall']:.1f}", f"{took['cpu']:.1f}", peak, allowed, word, *moved]
        lines.append(row([*cells, human_bytes(record["disk"])]))
    parts = list(asdict(plans["float16"]))
    lines += ["", row(["disk needed, computed", *parts, "together"]), row(["---"] * (2 + len(parts)))]
    for name, plan in plans.items():
        lines.append(row([f"{name} base", *map(human_bytes, asdict(plan).values()), human_bytes(plan.total)]))
    said = [f"- {name}: {record['note']}" for name, record in records.items() if record["state"] == "done"]
    return "\n".join([*lines, "", *(line for line in said if not line.endswith(": ")), ""])


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
