"""A measured process ends with the one that measures it, whenever the signal comes."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parents[2] / "benchmarks"

# A hook of the fork is where Python cannot let an exception through: it prints it and goes on.
SIGNALLED_WHILE_IT_FORKS = """
import os, signal, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from process_figures import measure

def end(*_):
    raise SystemExit(143)

signal.signal(signal.SIGTERM, end)
os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGTERM))
measure(["sleep", "60"], directory=Path(sys.argv[2]), scratch=Path(sys.argv[2]))
"""


def test_a_signal_that_comes_while_the_process_begins_is_not_lost(tmp_path: Path) -> None:
    script = [sys.executable, "-c", SIGNALLED_WHILE_IT_FORKS, str(HERE), str(tmp_path)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=30)
    assert done.returncode == 143, done.stderr
