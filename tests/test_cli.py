"""The command line: exit codes, one message for each error, JSON on stdout."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from exporter import FUNCTIONS
from tests.forked import Ended, Forks
from tests.pairs import Pair

Call = Callable[..., Ended]


@pytest.fixture
def call(forks: Forks) -> Call:
    """The command line with these words, in a process of its own; `code` is how it has to end."""

    def call(*arguments: object, code: int = 0) -> Ended:
        ended = forks.run([str(one) for one in arguments])
        assert ended.code == code, ended.log
        assert "Traceback" not in ended.log
        return ended

    return call


def test_as_a_module_in_a_process_that_has_imported_nothing(pair: Pair) -> None:
    command = f"inspect --base {pair.base} --adapter {pair.adapter} --json".split()
    done = subprocess.run([sys.executable, "-m", "exporter.cli", *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["changed"]) == 3


def test_merge_and_inspect_with_json(call: Call, pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merged = json.loads(call("merge", "--base", pair.base, "--adapter", pair.adapter, "--out", out, "--json").out)
    assert len(merged["tensors"]) == 40
    assert merged["skipped"] is False
    plan = json.loads(call("inspect", "--base", pair.base, "--adapter", pair.adapter, "--json").out)
    assert [change["scale"] for change in plan["changed"]] == [[4.0]] * 3
    assert plan["problems"] == []


def test_dry_run_writes_nothing(call: Call, pair: Pair, tmp_path: Path) -> None:
    done = call("merge", "--base", pair.base, "--adapter", pair.adapter, "--out", tmp_path / "out", "--dry-run")
    assert "changed   3 tensors: 3 x c_attn (LoRA, r=4, scale 4, in_out)" in done.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["merge", "--no-such-flag"],
        ["merge", "--base", "b"],
        ["export", ".", "--precision", "int3"],
        ["merge", "--base", "b", "--adapter", "a", "--out", "o", "--memory", "lots"],
        ["run"],
    ],
)
def test_wrong_usage_is_2(call: Call, arguments: list[str]) -> None:
    assert call(*arguments, code=2).log


def test_a_missing_input_is_4_and_one_message(call: Call, pair: Pair, tmp_path: Path) -> None:
    done = call("merge", "--base", tmp_path / "nowhere", "--adapter", pair.adapter, "--out", tmp_path / "out", code=4)
    assert done.log.startswith("error: ")
    assert "nowhere" in done.log
    assert "what to do: " in done.log
    assert not (tmp_path / "out").exists()


def test_inspect_lists_problems_and_exits_as_merge_would(call: Call, pair: Pair, tmp_path: Path) -> None:
    (pair.adapter / "adapter_config.json").write_text("{}")
    done = call("inspect", "--base", pair.base, "--adapter", pair.adapter, "--json", code=4)
    assert "peft_type" in json.loads(done.out)["problems"][0]


def test_inspect_refuses_a_vocabulary_that_merge_could_not_build(call: Call, pair: Pair) -> None:
    """A GPT-2 tokenizer of 2023: no tokenizer.json, and here a merge of tokens that the vocabulary lacks."""
    for path in pair.base.glob("*token*"):
        path.unlink()
    (pair.base / "vocab.json").write_text('{"a": 0, "b": 1}')
    (pair.base / "merges.txt").write_text("#version: 0.2\nc d\n")
    done = call("inspect", "--base", pair.base, "--adapter", pair.adapter, "--json", code=4)
    assert "tokenizer files" in json.loads(done.out)["problems"][0]


def test_offline_with_a_hub_id_is_5(call: Call) -> None:
    """tests/forked.py's processes are offline."""
    done = call("inspect", "--base", "owner/base", "--adapter", "owner/adapter", "--json", code=5)
    assert "owner/base" in json.loads(done.out)["problems"][0]


def test_the_version_is_the_packages(call: Call) -> None:
    assert call("--version").out == call("version").out == f"{version('exporter')}\n"


@pytest.mark.parametrize("flags", [[], ["-v"]])
def test_a_defect_is_5_and_never_parity_failed(flags: list[str]) -> None:
    program = (
        "import sys, exporter, exporter.cli as c\n"
        "def broken(**_): raise ZeroDivisionError('of our own')\n"
        "exporter.inspect = broken\n"
        f"sys.argv = ['exporter', 'inspect', '--base', 'b', '--adapter', 'a', *{flags!r}]\n"
        "c.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 5
    assert "an unexpected ZeroDivisionError: of our own" in done.stderr
    assert ("Traceback" in done.stderr) == bool(flags)


def test_every_command_has_help_with_an_example(call: Call) -> None:
    listing = call("--help").out
    for name in (name.replace("_", "-") for name in set(FUNCTIONS) - {"load"}):
        assert name in listing
        assert "exporter " + name in " ".join(call(name, "--help").out.split())


def test_terminated_is_143_and_leaves_nothing(pair: Pair, tmp_path: Path) -> None:
    program = (
        "import time, exporter.merging.shards as m, exporter.cli as c, sys\n"
        "def slow(*a, task, **k):\n"
        "    print('writing', flush=True)\n"
        "    while True: time.sleep(0.01); task.advance(0)\n"
        "m.write_shard = slow\n"
        f"sys.argv = ['exporter', 'merge', '--base', {str(pair.base)!r}, '--adapter', {str(pair.adapter)!r},"
        f" '--out', {str(tmp_path / 'out')!r}]\n"
        "c.main()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert not (tmp_path / "out").exists()
