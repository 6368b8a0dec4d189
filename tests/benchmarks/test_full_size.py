"""`make full-size` at the demo's own size: its figures, its budgets, and that it goes on where it was interrupted."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(HERE))

import full_size  # noqa: E402
import full_size_stages  # noqa: E402
import make_base  # noqa: E402
import widening  # noqa: E402
from process_figures import measure  # noqa: E402

MB = 1_000_000


def command(work: Path, *more: str) -> list[str]:
    skipped = ("--skip", "verify", "generate int8", "serve int4")
    return [sys.executable, str(HERE / "full_size.py"), "--size", "demo", "--work", str(work), *more, *skipped,
            "--shard-size", "10MB", "--new-tokens", "4"]  # fmt: skip


def run(work: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(work, *more), capture_output=True, text=True, timeout=300)


def interrupted_after(stage: str, work: Path) -> str:
    """Terminate a run once `stage` is recorded. Returns what it said."""
    process = subprocess.Popen(command(work, "--keep"), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    until = time.monotonic() + 120
    while stage not in full_size.recorded(work) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143, error
    return error


def results(work: Path) -> dict[str, Any]:
    return json.loads((work / "full-size-demo.json").read_text())


@pytest.mark.slow
def test_a_run_that_is_interrupted_goes_on_and_ends_clean(tmp_path: Path) -> None:
    work = tmp_path / "work"
    interrupted_after("merge", work)
    before = full_size.recorded(work)
    assert set(before) == {"make base", "inspect", "merge"}
    assert not list(work.glob("int8/*")), "the stage that was interrupted had not begun to write"

    done = run(work, "--keep", "--budget", "merge=50MB")
    assert done.returncode == 1, done.stderr
    assert "merge: over its budget" in done.stderr
    assert done.stderr.count("done before, unchanged") == 3
    assert full_size.recorded(work)["merge"] == before["merge"]

    stages = results(work)["stages"]
    made = {name for name, record in stages.items() if record["state"] == "done"}
    assert made >= {"make base", "inspect", "merge", "export native", "export int8", "export int4", "generate int4"}
    for name in made:
        figures = stages[name]["figures"]
        assert figures["cpu"] > 0.1
        assert 50 * MB < figures["anonymous"] < figures["peak"] < 2000 * MB, name
    assert stages["merge"]["within"] is False
    assert stages["export int4"]["within"] is True
    assert stages["verify"] == {"state": "left out", "note": "left out by --skip"}
    assert stages["inspect"]["note"] == "0 problems"
    assert stages["generate int4"]["note"]
    shards = sorted((work / "pair/base").glob("pytorch_model-*-of-*.bin"))
    assert len(shards) > 1
    weights = sum(path.stat().st_size for path in shards)
    assert abs(stages["make base"]["figures"]["written"] - weights) < 6 * MB  # and a tokenizer
    assert abs(results(work)["disk"]["float16"]["base"] - weights) < 0.1 * MB
    for precision in ("int8", "int4"):
        size = (work / precision / "weights.safetensors").stat().st_size
        assert results(work)["disk"]["float16"][precision] == pytest.approx(size, rel=0.01)

    again = run(work)
    assert again.returncode == 0, again.stderr
    assert "running" not in again.stderr
    table = (work / "full-size-demo.md").read_text()
    assert table in again.stdout
    assert "| float32 base |" in table
    assert {path.name for path in work.iterdir()} == {"full-size-demo.md", "full-size-demo.json"}


def test_a_finished_stage_counts_by_content(tmp_path: Path) -> None:
    """Not by its name, nor by the time of its files."""
    (tmp_path / "file").write_bytes(b"made")
    entry = full_size_stages._files(tmp_path, ".")["file"]
    record = {"request": {"command": ["merge"], "reads": {"base": "1"}}, "outputs": {"file": entry}}
    assert full_size.holds(record, {"command": ["merge"], "reads": {"base": "1"}}, tmp_path)
    assert not full_size.holds(record, {"command": ["merge"], "reads": {"base": "2"}}, tmp_path)
    os.utime(tmp_path / "file", (0, 0))
    assert full_size.holds(record, record["request"], tmp_path)
    (tmp_path / "file").write_bytes(b"mode")
    assert not full_size.holds(record, record["request"], tmp_path)
    (tmp_path / "file").unlink()
    assert not full_size.holds(record, record["request"], tmp_path)


def test_an_interrupted_verification_goes_on_and_says_so(tmp_path: Path) -> None:
    """Hours of logits are kept; the figures of what is left are not taken for those of all."""
    verify = next(one for one in full_size_stages.stages((), "1GB", 1) if one.name == "verify")
    assert verify.command[verify.command.index("--scratch") + 1] == verify.keeps
    line = "import pathlib; kept = pathlib.Path('logits'); print(kept.exists()); kept.mkdir(exist_ok=True); exit(%d)"
    stage = full_size_stages.Stage("verify", (), (), lambda _: {}, show=str.strip, keeps=verify.keeps)
    stopped = full_size.execute(replace(stage, command=(sys.executable, "-c", line % 9)), tmp_path, {})
    assert stopped["state"] == "failed"
    done = full_size.execute(replace(stage, command=(sys.executable, "-c", line % 0)), tmp_path, {})
    assert (done["state"], done["note"]) == ("done", "figures of the last part, after an interruption; True")


def test_a_disk_that_is_too_small_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = full_size.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(full_size.shutil, "disk_usage", lambda _: usage._replace(free=10_000 * MB))
    monkeypatch.setattr(sys, "argv", ["full_size.py", "--work", str(tmp_path / "work")])
    with pytest.raises(SystemExit) as stopped:
        full_size.main()
    assert stopped.value.code == 5
    message = capsys.readouterr().err
    assert "6.7B needs 4" in message
    assert "10.0 GB are free" in message
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# Dey et al., Cerebras-GPT (2023), table 1: parameters with the head tied
PARAMETERS = {"111M": 111e6, "256M": 256e6, "590M": 590e6, "1.3B": 1.316e9, "2.7B": 2.652e9, "6.7B": 6.658e9,
              "13B": 12.853e9}  # fmt: skip


@pytest.mark.parametrize("size", PARAMETERS)
def test_every_size_is_what_its_name_says(size: str) -> None:
    assert set(PARAMETERS) == set(make_base.SIZES)
    shape = make_base.SIZES[size]
    values = sum(math.prod(one) for one in make_base.tensor_shapes(shape).values())
    assert values == pytest.approx(PARAMETERS[size], rel=0.01)
    widened = make_base.nearest_demo_shape(shape)
    assert not widening.why_not(widened.width, widened.layers, widened.heads)
    plans = full_size.disk_plans(size)
    assert plans["float16"].merged == pytest.approx(2 * values, rel=0.2)  # the demo's widths are multiples of 128
    assert plans["float32"].merged == 2 * plans["float16"].merged


def test_the_cards_own_size_needs_about_forty_gigabytes() -> None:
    assert 38e9 < full_size.disk_plans("6.7B")["float16"].total < 44e9


def test_children_count(tmp_path: Path) -> None:
    """A child's memory, time and bytes are the command's."""
    child = "import time; held = bytearray(150_000_000); open('file', 'wb').write(held); time.sleep(0.5)"
    held = f"import subprocess, sys; own = bytearray(100_000_000); subprocess.run([sys.executable, '-c', {child!r}])"
    ended = measure([sys.executable, "-c", held], directory=tmp_path, scratch=tmp_path)
    assert ended.code == 0, ended.error
    assert 250 * MB < ended.figures.anonymous < ended.figures.peak < 400 * MB
    assert ended.figures.written >= 150 * MB
    assert ended.figures.wall > 0.5
