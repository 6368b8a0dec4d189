"""Progress as people see it: bars on a terminal, lines in a log, nothing when quiet."""

import io
import re
import threading

import pytest
from rich.console import Console

from exporter.progress import SILENT
from exporter.terminal import Bars, Lines, terminal_progress


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_lines_come_at_intervals_and_at_the_end(clock: Clock) -> None:
    stream = io.StringIO()
    with Lines(stream, interval=10, clock=clock).task("merge", 4e9, "B") as task:
        for _ in range(4):
            clock.time += 6
            task.advance(1e9)
    assert stream.getvalue().splitlines() == [
        "merge: 50 % (2.0 GB of 4.0 GB) after 12 s",
        "merge: 100 % (4.0 GB of 4.0 GB) after 24 s",
        "merge: 100 % (4.0 GB of 4.0 GB) after 24 s, done",
    ]


def test_a_count_has_its_noun_and_an_unknown_total_no_share(clock: Clock) -> None:
    stream = io.StringIO()
    lines = Lines(stream, clock=clock)
    with lines.task("verify", 8, "documents") as task:
        task.advance(8)
    with lines.task("download", 0, "B"):
        pass
    assert stream.getvalue().splitlines() == [
        "verify: 100 % (8 of 8 documents) after 0 s, done",
        "download: (0 B of 0 B) after 0 s, done",
    ]


def test_a_task_that_fails_says_where_it_stopped(clock: Clock) -> None:
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Lines(stream, clock=clock).task("merge", 4, "tensors") as task:  # noqa: PT012
        task.advance(1)
        raise KeyboardInterrupt
    assert stream.getvalue() == "merge: 25 % (1 of 4 tensors) after 0 s, stopped\n"


def test_threads_may_report_together(clock: Clock) -> None:
    stream = io.StringIO()
    with Lines(stream, clock=clock).task("stream", 4000, "tensors") as task:
        threads = [threading.Thread(target=lambda: [task.advance() for _ in range(1000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert "(4000 of 4000 tensors)" in stream.getvalue()


def render(stream: io.StringIO) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())


def test_bars_show_amounts_and_stop_being_live_between_tasks() -> None:
    stream = io.StringIO()
    bars = Bars(Console(file=stream, force_terminal=True, width=100))
    with bars.task("merge [bold]", 4e9, "B") as outer, bars.task("proof", 2, "tensors") as inner:
        outer.advance(4e9)
        inner.advance(2)
        bars.note("note [red]as written[/red]")
    text = render(stream)
    assert "merge [bold]" in text
    assert "4.0 GB of 4.0 GB" in text
    assert "2 of 2 tensors" in text
    assert "note [red]as written[/red]" in text
    assert stream.getvalue().count("\x1b[?25h") == 1, "the cursor comes back"
    with bars.task("export", 1, "graphs") as task:
        task.advance()
    assert "1 of 1 graphs" in render(stream)
    assert stream.getvalue().count("\x1b[?25h") == 2


def test_bars_give_the_cursor_back_when_a_task_fails() -> None:
    stream = io.StringIO()
    with pytest.raises(ValueError, match="x"), Bars(Console(file=stream, force_terminal=True)).task("merge", 1):
        raise ValueError("x")
    assert "\x1b[?25h" in stream.getvalue()


def test_the_stream_decides() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert isinstance(terminal_progress(stream=Terminal()), Bars)
    assert isinstance(terminal_progress(stream=io.StringIO()), Lines)
    assert terminal_progress(quiet=True, stream=Terminal()) is SILENT


def test_notes_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    terminal_progress().note("export: done and still true, skipped")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "export: done and still true, skipped\n"
