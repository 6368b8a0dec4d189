"""A merge that is killed anywhere leaves the old state, one that does not load, or the finished one; and it goes on."""

import hashlib
import json
import random
import shutil
import signal
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from exporter.files import LOCK
from exporter.manifest import MANIFEST
from exporter.merging.journal import JOURNAL
from tests.forked import STAGES, Ended, Fault, Forks
from tests.pairs import Pair, gpt2_config, make_pair

KILLS = 100
# Without this, planning would take most of a merge of some hundred kilobytes, and most kills would fall into it.
WRITE_SECONDS = 0.002
KILLED_BEFORE = ("pwrite", "fsync", "preadv", "replace", "unlink")
FORCE = {False: (), True: ("--force",)}


@dataclass(frozen=True)
class Stage:
    """A pair, what an undisturbed merge of it makes, and a finished checkpoint of another merge."""

    forks: Forks
    pair: Pair
    old: Path
    wanted: Mapping[str, str]
    undisturbed: Ended

    def command(self, out: Path, *more: str) -> list[str]:
        pair = ["--base", str(self.pair.base), "--adapter", str(self.pair.adapter)]
        return ["merge", *pair, "--out", str(out), "--shard-size", "40kB", "--memory", "200kB", "--quiet", *more]


@pytest.fixture(scope="module")
def stage(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    directory = tmp_path_factory.mktemp("crash")
    pair = make_pair(directory, gpt2_config(n_layer=1))
    begun = Stage(forks, pair, directory / "old", {}, Ended(0, 0.0, {}, "", ""))
    forks.run(begun.command(directory / "old", "--weight", "0.5", "--shard-size", "80kB"))
    undisturbed = forks.run(begun.command(directory / "wanted"), Fault(slow=WRITE_SECONDS))
    assert undisturbed.code == 0, undisturbed.log
    return Stage(forks, pair, directory / "old", visible(directory / "wanted"), undisturbed)


def visible(out: Path) -> dict[str, str]:
    """Digest by name of what a loader may see. The manifest's is of what does not depend on the time and the inode."""
    files = {path.name: path.read_bytes() for path in out.glob("[!.]*")} if out.exists() else {}
    if MANIFEST in files:
        files[MANIFEST] = account(files[MANIFEST])
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def account(manifest: bytes) -> bytes:
    section = json.loads(manifest)["stages"]["merge"]
    section["files"] = {name: [entry["size"], entry["sha256"]] for name, entry in section["files"].items()}
    return json.dumps(section, sort_keys=True).encode()


def state(stage: Stage, out: Path, old: Mapping[str, str]) -> str:
    """ "old", "partial" or "finished"; any other state fails. Only the manifest may be missing in the last."""
    seen = visible(out)
    if old and seen == old:
        return "old"
    if seen == stage.wanted or seen == {n: d for n, d in stage.wanted.items() if n != MANIFEST}:
        return "finished"
    assert "config.json" not in seen, f"something that loads and is neither the old nor the new: {sorted(seen)}"
    if out.exists():
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(out)
    return "partial"


def finished_shards(out: Path) -> dict[str, int]:
    """Inode by name of the shards that the journal lists and that stand as it says."""
    if not (out / JOURNAL).exists():
        return {}
    inodes = {}
    for name, entry in json.loads((out / JOURNAL).read_text())["shards"].items():
        for path in (out / f".{name}.partial", out / name):
            if path.exists() and path.stat().st_ino == entry["stamp"]["inode"]:
                inodes[name] = path.stat().st_ino
    return inodes


def resume(stage: Stage, out: Path, *, force: bool) -> int:
    """Run to the end and compare everything. Returns how many shards were not written again."""
    kept = finished_shards(out)
    ended = stage.forks.run(stage.command(out, *FORCE[force]))
    assert ended.code == 0, ended.log
    assert visible(out) == stage.wanted
    assert {path.name for path in out.iterdir()} == set(stage.wanted), "something is left over"
    assert {name: (out / name).stat().st_ino for name in kept} == kept, "a finished shard was written again"
    return len(kept)


def phase(ended: Ended) -> str:
    """The last one that began."""
    return next((name for name in reversed(STAGES) if ended.calls[name]), "plan")


def begin(stage: Stage, out: Path, over_old: bool) -> dict[str, str]:
    """An output that is not there, or the finished checkpoint of another merge."""
    if not over_old:
        return {}
    shutil.copytree(stage.old, out)
    return visible(out)


def test_the_undisturbed_run_is_worth_killing(stage: Stage) -> None:
    """Several shards, and each kind of call that the other tests kill before."""
    assert sum(name.endswith(".safetensors") for name in stage.wanted) >= 4
    assert set(stage.wanted) > {"config.json", MANIFEST, "model.safetensors.index.json", "tokenizer.json"}
    assert all(stage.undisturbed.calls[name] > 3 for name in KILLED_BEFORE)
    assert not set(visible(stage.old).values()) >= set(stage.wanted.values())


def test_killed_at_a_hundred_random_moments(stage: Stage, tmp_path: Path) -> None:
    """Each kill is followed by another or by a run to the end; half of the outputs held another merge before."""
    chance = random.Random(20)
    phases: Counter[str] = Counter()
    states: Counter[str] = Counter()
    kills = kept = scenario = 0
    while kills < KILLS or (kills < 10 * KILLS and not (kept > 10 and set(phases) > set(STAGES) and states["old"])):
        scenario += 1
        out, over_old = tmp_path / str(scenario), scenario % 2 == 0
        old = begin(stage, out, over_old)
        again = True
        while again:
            after = chance.uniform(0, stage.undisturbed.seconds)
            ended = stage.forks.run(stage.command(out, *FORCE[over_old]), Fault(kill_after=after, slow=WRITE_SECONDS))
            assert ended.code in (-signal.SIGKILL, 0), ended.log
            kills += 1
            phases[phase(ended)] += 1
            states[state(stage, out, old)] += 1
            again = chance.random() < 0.4
        kept += resume(stage, out, force=over_old)
        shutil.rmtree(out)
    assert set(phases) == {"plan", *STAGES}
    assert set(states) >= {"old", "partial"}, states
    assert kept > 10, "no kill came after a finished shard, so nothing was seen to be kept"


@pytest.mark.parametrize(
    ("call", "over_old"),
    [("pwrite", False), ("preadv", False), *((call, True) for call in ("fsync", "replace", "unlink"))],
)
def test_killed_before_every_call_that_changes_the_disk(
    stage: Stage, tmp_path: Path, call: str, over_old: bool
) -> None:
    """Renames and removals one by one; of the many writes, reads and syncs some, the last among them."""
    out = tmp_path / "count"
    begin(stage, out, over_old)
    command = stage.command(out, *FORCE[over_old])
    count = stage.forks.run(command).calls[call]
    few = range(1, count + 1, 1 if call in ("replace", "unlink") else max(1, count // 4))
    states: Counter[str] = Counter()
    for number in sorted({*few, count}):
        out = tmp_path / str(number)
        old = begin(stage, out, over_old)
        command = stage.command(out, *FORCE[over_old])
        ended = stage.forks.run(command, Fault(call, number, signal=signal.SIGKILL))
        if ended.code == -signal.SIGKILL:
            states[state(stage, out, old)] += 1
        resume(stage, out, force=over_old)
        shutil.rmtree(out)
    assert states["partial"] or states["old"], "no kill fell"


def test_what_is_begun_goes_on_without_force(stage: Stage, tmp_path: Path) -> None:
    """Once the old output is gone, the same command needs no --force to go on, and another command does."""
    out = tmp_path / "out"
    begin(stage, out, True)
    removals = stage.forks.run(stage.command(tmp_path / "count")).calls["replace"]
    stage.forks.run(stage.command(out, "--force"), Fault("replace", removals - 2, signal=signal.SIGKILL))
    assert state(stage, out, {}) == "partial"
    other = stage.forks.run(stage.command(out, "--weight", "2"))
    assert (other.code, state(stage, out, {})) == (2, "partial"), other.log
    assert resume(stage, out, force=False) >= 4


def test_a_kill_after_the_manifest_leaves_nothing_for_good(stage: Stage, tmp_path: Path) -> None:
    """The journal and the lock file go when the same command finds the merge done."""
    out = tmp_path / "out"
    unlinks = stage.forks.run(stage.command(tmp_path / "count")).calls["unlink"]
    ended = stage.forks.run(stage.command(out), Fault("unlink", unlinks, signal=signal.SIGKILL))
    assert ended.code == -signal.SIGKILL
    assert visible(out) == stage.wanted
    assert (out / LOCK).exists()
    inode = (out / MANIFEST).stat().st_ino
    resume(stage, out, force=False)
    assert (out / MANIFEST).stat().st_ino == inode, "a finished merge was made again"


def test_the_next_merge_removes_what_another_one_left(stage: Stage, tmp_path: Path) -> None:
    """Gigabytes of partial shards must not stay because the user chose another weight."""
    out = tmp_path / "out"
    stage.forks.run(stage.command(out, "--weight", "3"), Fault("replace", 4, signal=signal.SIGKILL))
    assert finished_shards(out)
    assert stage.forks.run(stage.command(out)).code == 0
    assert visible(out) == stage.wanted
    assert {path.name for path in out.iterdir()} == set(stage.wanted)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["terminated", "interrupted"]
)
@pytest.mark.parametrize(("call", "slow"), [("pwrite", 0.5), ("prove_shard", 0.01)], ids=["writing", "proving"])
def test_signals(stage: Stage, tmp_path: Path, number: int, code: int, call: str, slow: float) -> None:
    """At once, though a shard has long to go: a scheduler kills for good after seconds. The same command goes on."""
    out = tmp_path / "out"
    ended = stage.forks.run(stage.command(out), Fault(call, 1, signal=number, slow=slow))
    assert ended.code == code, ended.log
    assert "Traceback" not in ended.log
    assert slow < 0.1 or ended.calls["pwrite"] < stage.undisturbed.calls["pwrite"] / 2
    assert state(stage, out, {}) == "partial"
    assert set(visible(out)) == set()
    if out.exists():
        names = {path.name for path in out.iterdir()} - {JOURNAL}
        assert names == {f".{name}.partial" for name in finished_shards(out)}, "more than finished shards is left"
    again = stage.forks.run(stage.command(out))
    assert (again.code, again.log.count("Traceback")) == (0, 0)
    assert visible(out) == stage.wanted


def test_a_killed_process_frees_its_lock(stage: Stage, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stage.forks.run(stage.command(out), Fault("pwrite", 3, signal=signal.SIGKILL))
    assert (out / LOCK).exists()
    resume(stage, out, force=False)


def test_a_journal_that_is_damaged_or_lies_is_not_believed(stage: Stage, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for damage in ("{", "[]", '{"request": 1}', "lies", "shards"):
        stage.forks.run(stage.command(out), Fault("replace", 4, signal=signal.SIGKILL))
        assert finished_shards(out)
        journal = json.loads((out / JOURNAL).read_text())
        if damage == "lies":
            for entry in journal["shards"].values():
                entry["written"] = [{"name": 1}]
        elif damage == "shards":
            journal["shards"] = ["model.safetensors"]
        else:
            journal = None
        (out / JOURNAL).write_text(json.dumps(journal) if journal else damage)
        assert stage.forks.run(stage.command(out)).code == 0
        assert visible(out) == stage.wanted
        shutil.rmtree(out)
