"""`make bench-export`: what exporting costs beyond reading, writing and hashing as much, round by round."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(HERE))

import bench_export  # noqa: E402
from measure import Run  # noqa: E402

from tests.graph.conftest import save_byte_tokenizer, tiny_model  # noqa: E402


def test_the_control_writes_as_much_as_it_is_told(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.write_bytes(b"a" * (5 << 20))
    size = (9 << 20) + 17
    subprocess.run([sys.executable, HERE / "read_write.py", out, str(size), "2", source], check=True)
    assert out.stat().st_size == size


def test_differences_are_taken_within_a_round() -> None:
    rounds = {
        "export": [Run(10, 14, 0), Run(50, 60, 0), Run(12, 18, 0)],
        "read and write": [Run(4, 4, 0), Run(40, 44, 0), Run(3, 3, 0)],
    }
    assert bench_export.beyond(rounds, "read and write", "wall") == 9
    assert bench_export.beyond(rounds, "read and write", "cpu") == 15


def test_a_run_leaves_its_table_and_no_file(tmp_path: Path) -> None:
    checkpoint, work = tmp_path / "checkpoint", tmp_path / "work"
    checkpoint.mkdir()
    work.mkdir()
    tiny_model(checkpoint, n_positions=64)
    save_byte_tokenizer(checkpoint)
    rounds = bench_export.measure(checkpoint, work, "int8", 1)
    table = bench_export.table("int8", rounds)
    assert "| export beyond: read, write and hash |" in table
    assert bench_export.beyond(rounds, "read and write", "cpu") > 0
    assert list(work.iterdir()) == []
