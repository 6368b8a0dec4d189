"""Every fault against every command: one clear message, the right exit code, nothing half-made, and a way to go on.

`make faults` runs all of it and writes build/fault-matrix.md; `make test` leaves the slow commands and the many points
out. Merging is looked at in depth in tests/merging/test_crash.py and test_faults.py; here it has its rows.
"""

import errno
import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from exporter.files import LOCK, lock_directory
from tests.faults.commands import COMMANDS, Command, Inputs, half_made, listed, made_by
from tests.faults.conftest import Undisturbed, ending, matrix, points, remount, require
from tests.forked import NONE, Ended, Fault, Forks

SLOW = ("verify", "run", "doctor", "capture")
KILLS = 4
MB = 1_000_000


def each(*, fault: str, only: Callable[[Command], bool] = lambda command: True) -> pytest.MarkDecorator:
    """Every command that the fault can meet; those that take seconds are left to `make faults`."""
    names = [name for name, command in COMMANDS.items() if only(command)]
    slow = pytest.mark.slow
    return pytest.mark.parametrize(
        ("fault", "name"), [pytest.param(fault, name, marks=slow if name in SLOW else ()) for name in names]
    )


def reads(command: Command) -> bool:
    return command.reads != ""


@dataclass(frozen=True)
class Scene:
    """One command on one output directory, and what it makes when nothing goes wrong."""

    forks: Forks
    name: str
    inputs: Inputs
    out: Path
    wanted: Undisturbed

    @property
    def command(self) -> Command:
        return COMMANDS[self.name]

    def begin(self) -> None:
        self.command.begin(self.inputs, self.out)

    def run(self, fault: Fault = NONE) -> Ended:
        return self.forks.run(self.command.line(self.inputs, self.out), fault)

    def nothing_is_half_made(self) -> None:
        before = made_by(self.inputs.root / "merged") if self.command.copies else {}
        assert not half_made(self.out, self.wanted.made, before)

    def refused(self, ended: Ended, *codes: int) -> str:
        """The error's message: one, and no bug. `inspect` and `doctor` list what is wrong in their answer."""
        assert ended.code in codes, (ended.code, ended.log)
        assert "Traceback" not in ended.log, ended.log
        assert "unexpected" not in ended.log, ended.log
        self.nothing_is_half_made()
        if ended.out:
            return listed(ended.out)
        assert ended.log.count("error: ") == 1, ended.log
        return ended.message

    def goes_on(self) -> None:
        """The same command, undisturbed: it ends as it does without a fault, with the same files and no others."""
        ended = self.run()
        assert ended.code == self.wanted.ended.code, ended.log
        if not self.command.writes:
            assert self.command.answer(ended.out) == self.command.answer(self.wanted.ended.out)
            return
        assert made_by(self.out) == self.wanted.made
        left = [path.name for path in self.out.rglob(".*") if path.is_file()]
        assert not left, f"left over: {left}"


@pytest.fixture
def scene(
    forks: Forks, inputs: Inputs, undisturbed: Callable[..., Undisturbed], tmp_path: Path
) -> Callable[..., Scene]:
    def make(name: str, *, out: Path | None = None, own_inputs: bool = False, root: Path | None = None) -> Scene:
        own = inputs.copied(root or tmp_path / "inputs") if own_inputs else inputs
        return Scene(forks, name, own, out or tmp_path / "out", undisturbed(name))

    return make


def middle(scene: Scene, calls: tuple[str, ...]) -> tuple[str, int]:
    """The first kind of call that the command makes, and the one in the middle."""
    call, count = points(scene.wanted.ended.calls, *calls)[0]
    return call, (count + 1) // 2


@each(fault="SIGKILL")
def test_killed(scene: Callable[..., Scene], fault: str, name: str, request: pytest.FixtureRequest) -> None:
    """At random moments, again and again on one output."""
    with matrix(fault, name) as outcome:
        here = scene(name)
        here.begin()
        chance, seconds = random.Random(name), here.wanted.ended.seconds
        kills, runs = 0, 2 if name in SLOW else KILLS
        while kills < runs:
            ended = here.run(Fault(kill_after=chance.uniform(0, seconds)))
            assert ended.code in (-signal.SIGKILL, here.wanted.ended.code), ended.log
            here.nothing_is_half_made()
            kills += ended.code == -signal.SIGKILL
            if ended.code != -signal.SIGKILL:  # it was faster this time
                seconds = min(seconds, ended.seconds)
                shutil.rmtree(here.out, ignore_errors=True)
                here.begin()
        here.goes_on()
        outcome("goes on, same bytes")


@each(fault="SIGKILL before a call", only=lambda command: command.writes)
def test_killed_before_what_changes_the_disk(scene: Callable[..., Scene], fault: str, name: str) -> None:
    """Before the first and the last sync, renaming and removal."""
    with matrix(fault, name) as outcome:
        here = scene(name)
        for call, count in points(here.wanted.ended.calls, "fsync", "replace", "unlink"):
            for number in {1, count} if name not in SLOW else {count}:
                here.begin()
                ended = here.run(Fault(call, number, signal=signal.SIGKILL))
                assert ended.code == -signal.SIGKILL, ended.log
                here.nothing_is_half_made()
                here.goes_on()
                shutil.rmtree(here.out)
        outcome("goes on, same bytes")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"])
@each(fault="signal", only=reads)
def test_signals(scene: Callable[..., Scene], fault: str, name: str, number: int, code: int) -> None:
    with matrix(signal.Signals(number).name, name) as outcome:
        here = scene(name)
        here.begin()
        call, at = middle(here, ("pwrite", "fsync", "preadv", "read_bytes"))
        ended = here.run(Fault(call, at, signal=number))
        assert ended.code == code, ended.log
        assert "Traceback" not in ended.log
        here.nothing_is_half_made()
        here.goes_on()
        outcome(f"exit {code}, goes on")


@each(fault="disk full (ENOSPC)", only=lambda command: command.writes)
def test_a_call_that_finds_the_disk_full(scene: Callable[..., Scene], fault: str, name: str) -> None:
    with matrix(fault, name) as outcome:
        here = scene(name)
        for call, count in points(here.wanted.ended.calls, "pwrite", "fsync"):
            for number in sorted({1, count} if name not in SLOW else {count}):
                here.begin()
                ended = here.run(Fault(call, number, error=errno.ENOSPC))
                assert "No space left" in here.refused(ended, 5)
                here.goes_on()
                shutil.rmtree(here.out)
        outcome("exit 5, goes on")


@each(fault="disk full (file system)", only=lambda command: command.writes)
def test_a_file_system_that_is_full(scene: Callable[..., Scene], disk: Path, fault: str, name: str) -> None:
    """The kernel's own error, wherever it comes."""
    with matrix(fault, name) as outcome:
        require(disk)
        here = scene(name, out=disk / "out")
        here.begin()
        space = os.statvfs(disk)
        begun = (space.f_blocks - space.f_bfree) * space.f_frsize
        remount(disk, f"size={begun + (8 << 10 if name in ('export native', 'verify', 'capture') else 200 << 10)}")
        assert here.refused(here.run(Fault(hide_full=True)), 5)
        remount(disk, "size=64m")
        here.goes_on()
        outcome("exit 5, goes on")


def test_temporary_files_on_a_full_disk(scene: Callable[..., Scene], disk: Path) -> None:
    """`capture` alone has any: verify keeps its logits beside its report."""
    with matrix("disk full (TMPDIR)", "capture") as outcome:
        require(disk)
        here = scene("capture")
        remount(disk, "size=100k")
        message = here.refused(here.run(Fault(hide_full=True, scratch=str(disk))), 5)
        assert "No space left" in message
        here.goes_on()
        outcome("exit 5, goes on")


@each(fault="read error (EIO)", only=reads)
def test_a_disk_that_cannot_be_read(scene: Callable[..., Scene], fault: str, name: str) -> None:
    with matrix(fault, name) as outcome:
        here = scene(name)
        for call, count in points(here.wanted.ended.calls, "preadv", "read_bytes"):
            for number in sorted({1, (count + 1) // 2}):
                here.begin()
                ended = here.run(Fault(call, number, error=errno.EIO))
                assert "Input/output error" in here.refused(ended, 5)
                here.goes_on()
                shutil.rmtree(here.out, ignore_errors=True)
        outcome("exit 5, goes on")


@each(fault="input replaced", only=lambda command: command.writes)
def test_an_input_that_is_replaced(scene: Callable[..., Scene], tmp_path: Path, fault: str, name: str) -> None:
    """By a file of the same layout with other values: half of the output would be of each."""
    with matrix(fault, name) as outcome:
        here = scene(name, own_inputs=True)
        here.begin()
        weights = (here.out if here.command.copies else here.inputs.root / "merged").joinpath("model.safetensors")
        old = weights if here.command.reads.startswith("merged") else here.inputs.root / here.command.reads
        other, kept = tmp_path / "other", tmp_path / "kept"
        data = bytearray(old.read_bytes())
        for at in range(len(data) // 2, len(data) - 2, 64):
            data[at] ^= 1
        other.write_bytes(data)
        os.link(old, kept)
        call, at = middle(here, ("preadv",))
        ended = here.run(Fault(call, at, replace=(str(other), str(old))))
        kept.rename(old)
        assert "changed" in here.refused(ended, 4)
        here.goes_on()
        outcome("exit 4, goes on")


@each(fault="two processes", only=lambda command: command.writes)
def test_a_second_process(scene: Callable[..., Scene], fault: str, name: str) -> None:
    with matrix(fault, name) as outcome:
        here = scene(name)
        here.begin()
        holding = here.out / name.removeprefix("export ") if name in ("export int8", "export int4") else here.out
        before = made_by(here.out) if here.out.exists() else {}
        with lock_directory(holding):
            assert "another exporter process" in here.refused(here.run(), 2)
            assert made_by(here.out) == before
            assert [path.name for path in holding.iterdir() if path.name.startswith(".")] == [LOCK]
        here.goes_on()
        outcome("exit 2")


@each(fault="low memory")
def test_little_memory(
    forks: Forks,
    large_inputs: Inputs,
    undisturbed: Callable[..., Undisturbed],
    tmp_path: Path,
    fault: str,
    name: str,
) -> None:
    """None at all, and less than the model's 26 MB take: it says so, or it manages.

    Where there is no room even for a thread's own storage, the C library aborts before Python can say anything.
    """
    with matrix(fault, name) as outcome:
        here = Scene(forks, name, large_inputs, tmp_path / "out", undisturbed(name, large_inputs))
        here.begin()
        endings = []
        for room in (1, 40 * MB):
            ended = here.run(Fault(memory=room))
            endings.append(ending(ended))
            if ended.code in (-signal.SIGABRT, -signal.SIGSEGV):
                here.nothing_is_half_made()
            elif ended.code != here.wanted.ended.code:
                assert "memory" in here.refused(ended, 5).lower()
        here.goes_on()
        outcome("{} without memory, {} with 40 MB; goes on".format(*endings))


@each(fault="clock")
def test_a_clock_that_goes_backwards(scene: Callable[..., Scene], fault: str, name: str) -> None:
    """And inputs of 1970 and of 2100. The next run, with a right clock, finds everything done."""
    with matrix(fault, name) as outcome:
        here = scene(name, own_inputs=True)
        for number, path in enumerate(sorted(here.inputs.root.rglob("*"))):
            os.utime(path, (0, 0) if number % 2 else (4_102_444_800, 4_102_444_800))
        here.begin()
        ended = here.run(Fault(clock=True))
        assert ended.code == here.wanted.ended.code, ended.log
        here.nothing_is_half_made()
        if name != "unmerge":  # which never writes over anything
            here.goes_on()
        outcome("same bytes")


@each(fault="read-only output", only=lambda command: command.writes)
def test_an_output_that_is_read_only(scene: Callable[..., Scene], disk: Path, fault: str, name: str) -> None:
    with matrix(fault, name) as outcome:
        require(disk)
        here = scene(name, out=disk / "out")
        here.begin()
        remount(disk, "ro")
        assert "Read-only file system" in here.refused(here.run(), 5)
        remount(disk, "rw")
        here.goes_on()
        outcome("exit 5, goes on")


@each(fault="read-only inputs", only=reads)
def test_inputs_that_are_read_only(scene: Callable[..., Scene], disk: Path, fault: str, name: str) -> None:
    """Nothing is written beside what is read."""
    with matrix(fault, name) as outcome:
        require(disk)
        here = scene(name, own_inputs=True, root=disk / "inputs")
        remount(disk, "ro")
        here.begin()
        here.goes_on()
        outcome("works" if here.command.writes else "works, same answer")


@each(fault="odd names", only=reads)
def test_names_with_spaces_and_other_alphabets(
    scene: Callable[..., Scene], tmp_path: Path, fault: str, name: str
) -> None:
    with matrix(fault, name) as outcome:
        odd = tmp_path / "Größe 'naïve' 模型 \"x\" $HOME 100% #1"
        odd.mkdir()
        here = scene(name, own_inputs=True, root=odd / "in puts", out=odd / "aus gabe é")
        here.begin()
        here.goes_on()
        outcome("works")


@each(fault="long path", only=reads)
def test_a_very_long_path(scene: Callable[..., Scene], tmp_path: Path, fault: str, name: str) -> None:
    """2,500 characters work; 5,000 are more than the kernel takes."""
    with matrix(fault, name) as outcome:
        root, out = tmp_path.joinpath(*["n" * 200] * 6), tmp_path.joinpath(*["o" * 200] * 12)
        here = scene(name, own_inputs=True, root=root, out=out)
        here.out.parent.mkdir(parents=True)
        here.begin()
        here.goes_on()
        if here.command.writes and not here.command.copies:
            beyond = scene(name, out=tmp_path.joinpath(*["o" * 200] * 25))
            beyond.refused(beyond.run(), 2, 5)
            unheard = scene(name, out=tmp_path / ("o" * 300))
            unheard.refused(unheard.run(), 2, 5)
        outcome("works; beyond the kernel's limit exit 2 or 5")
