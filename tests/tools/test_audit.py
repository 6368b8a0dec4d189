"""`make audit` with a pip-audit that says what a test wants: the exit code says whether everything was looked up."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

AUDIT = Path(__file__).parents[2] / "tools/audit.py"
SAFE = {"name": "safe", "version": "1.0", "vulns": []}
HOLED = {"name": "holed", "version": "2.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.1"]}]}
UNFIXED = {"name": "unfixed", "version": "3.0", "vulns": [{"id": "PYSEC-2", "fix_versions": []}]}
UNKNOWN = {"name": "unknown", "skip_reason": "not found on the index"}


def audit(tmp_path: Path, stdout: str, stderr: str = "", code: int = 0) -> tuple[int, str]:
    """The exit code of tools/audit.py and what it prints, where pip-audit says and returns this."""
    (tmp_path / "said").write_text(stdout)
    (tmp_path / "complained").write_text(stderr)
    stub, lock = tmp_path / "pip-audit", tmp_path / "constraints.txt"
    stub.write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/asked\ncat {tmp_path}/said\ncat {tmp_path}/complained >&2\nexit {code}\n'
    )
    stub.chmod(0o755)
    done = subprocess.run([sys.executable, str(AUDIT), str(stub), str(lock)], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert f"--requirement {lock}" in (tmp_path / "asked").read_text()
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("packages", "code", "said"),
    [
        ([SAFE], 0, "1 packages"),
        ([SAFE, HOLED], 1, "ADVISORY holed 2.0: PYSEC-1, fixed in 2.1"),
        ([UNFIXED], 1, "ADVISORY unfixed 3.0: PYSEC-2, fixed in no version"),
        ([SAFE, UNKNOWN], 5, "NOT AUDITED: unknown: "),
        ([HOLED, UNKNOWN], 1, "ADVISORY holed"),
        ([UNKNOWN], 5, "NOT AUDITED: the advisory database could not be reached, or answered nothing (not found"),
        ([], 5, "NOT AUDITED: the advisory database"),
    ],
    ids=["safe", "an advisory", "no fix", "one unknown", "an advisory and one unknown", "all unknown", "nothing"],
)
def test_an_account_of_packages(tmp_path: Path, packages: list[dict[str, Any]], code: int, said: str) -> None:
    found = any(package.get("vulns") for package in packages)
    ended, shown = audit(tmp_path, json.dumps({"dependencies": packages}), code=int(found))
    assert ended == code
    assert said in shown


@pytest.mark.parametrize("stdout", ["", "no JSON", "{}"])
def test_a_database_that_cannot_be_reached_is_no_clean_bill(tmp_path: Path, stdout: str) -> None:
    ended, shown = audit(tmp_path, stdout, "ConnectionError: no route to host\n", 1)
    assert ended == 5
    assert "NOT AUDITED: the advisory database could not be reached" in shown
    assert "no route to host" in shown
