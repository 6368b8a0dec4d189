"""action.yml and the jobs of docs/ci.md: their shell is really run, with an `exporter` that notes what it is given."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text())
JOBS = [
    yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "ci.md").read_text(), re.S)
]
BASH = shutil.which("bash")
# Notes its arguments, one to a line, writes a report where it is told to, and ends as it is told to.
FAKE = r"""#!/usr/bin/env bash
for one in "$@"; do printf '%s\n' "${one//$'\n'/<newline>}" >> "$NOTED"; done
for one in "$@"; do case $one in --report=*) report="${one#--report=}" ;; esac; done
echo "::error::a tensor's name"
echo "score R: 100 %" >&2
if [ "$ENDS" != 4 ]; then mkdir -p -- "$report" && echo "# Parity of $ENDS" > "$report/summary.md"; fi
if [ "$ENDS" = 4 ]; then echo "error: there is no base" >&2; fi
exit "$ENDS"
"""


@dataclass(frozen=True, slots=True)
class Ran:
    code: int
    arguments: list[str]
    summary: str
    outputs: dict[str, str]
    log: str


def filled(value: str, inputs: Mapping[str, str]) -> str:
    """An expression of the action with its inputs put in, as the runner does before a step starts."""

    def put(match: re.Match[str]) -> str:
        name, default = re.fullmatch(r"inputs\.([\w-]+)(?: \|\| '(\w*)')?", match.group(1)).groups()  # type: ignore[union-attr]
        return inputs[name] or default or ""

    return re.sub(r"\$\{\{ (.*?) \}\}", put, value)


def run_step(place: Path, step: Mapping[str, Any], inputs: Mapping[str, str], code: int, program: str = FAKE) -> Ran:
    """One shell step, run as the runner runs it: `bash -eo pipefail FILE`, inputs through the environment."""
    assert BASH is not None
    (place / "bin").mkdir(parents=True, exist_ok=True)
    (place / "bin" / "exporter").write_text(program)
    (place / "bin" / "exporter").chmod(0o755)
    (place / "step.sh").write_text(step["run"])
    given = {name: option.get("default", "") for name, option in ACTION["inputs"].items()} | dict(inputs)
    environment = {name: filled(value, given) for name, value in step.get("env", {}).items()}
    files = {name: str(place / name.lower()) for name in ("GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT", "NOTED")}
    for file in files.values():
        Path(file).write_text("")
    done = subprocess.run(
        [BASH, "--noprofile", "--norc", "-eo", "pipefail", place / "step.sh"],
        cwd=place,
        env={"PATH": f"{place / 'bin'}:{os.environ['PATH']}", "ENDS": str(code), **files, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    outputs = dict(line.split("=", 1) for line in Path(files["GITHUB_OUTPUT"]).read_text().splitlines())
    noted = Path(files["NOTED"]).read_text().splitlines()
    return Ran(
        done.returncode, noted, Path(files["GITHUB_STEP_SUMMARY"]).read_text(), outputs, done.stdout + done.stderr
    )


def step(name: str) -> dict[str, Any]:
    return next(one for one in ACTION["runs"]["steps"] if one["name"] == name)


GIVEN = {"base": "models/base", "adapter": "models/adapter", "bundle": "build/merged\nbuild/int8\n"}


@pytest.mark.parametrize(("code", "verdict"), [(0, "PASS"), (1, "FAIL"), (3, "INCONCLUSIVE")])
def test_the_exit_code_is_kept_and_the_summary_written(code: int, verdict: str, tmp_path: Path) -> None:
    ran = run_step(tmp_path, step("Verify"), GIVEN, code)
    assert ran.code == code
    assert ran.summary == f"# Parity of {code}\n"
    assert ran.outputs == {"verdict": verdict, "exit-code": str(code)}
    assert ran.arguments == [
        "verify", "--base=models/base", "--adapter=models/adapter", "--bundle=build/merged", "--bundle=build/int8",
        "--level=commit", "--reference=int8", "--report=parity",
    ]  # fmt: skip
    assert "score R: 100 %" in ran.log


def test_a_refusal_is_told_and_an_old_report_is_not_taken_for_its_own(tmp_path: Path) -> None:
    (tmp_path / "parity").mkdir()
    for name in ("summary.md", "junit.xml", "verification.json", "report.html"):
        (tmp_path / "parity" / name).write_text("# PASS of yesterday\n")
    ran = run_step(tmp_path, step("Verify"), GIVEN, 4)
    assert ran.code == 4
    assert "nothing was compared (exit code 4)" in ran.summary
    assert "    error: there is no base" in ran.summary
    assert "yesterday" not in ran.summary
    assert ran.outputs == {"verdict": "", "exit-code": "4"}
    assert list((tmp_path / "parity").iterdir()) == []


@pytest.mark.parametrize(
    "evil",
    [
        "$(touch owned)",
        "`touch owned`",
        "'; touch owned; '",
        '"; touch owned; "',
        "a b  *",
        "--help",
        "x\\ny",
        "$HOME",
        "-",
    ],
)
def test_no_input_is_ever_run(evil: str, tmp_path: Path) -> None:
    inputs = {name: evil for name in ACTION["inputs"] if name != "report"} | {"report": "re po'rt"}
    ran = run_step(tmp_path, step("Verify"), inputs, 0)
    assert ran.code == 0
    assert not (tmp_path / "owned").exists()
    flags = ("base", "adapter", "weight", "bundle", "level", "reference", "prompts")
    assert ran.arguments == ["verify", *(f"--{flag}={evil}" for flag in flags), "--report=re po'rt"]


def test_lines_are_values_and_empty_ones_are_none(tmp_path: Path) -> None:
    inputs = GIVEN | {"adapter": "a\r\n\n b c\n", "weight": "0.5\n1", "prompts": "", "report": ""}
    ran = run_step(tmp_path, step("Verify"), inputs, 0)
    assert ran.arguments[2:6] == ["--adapter=a", "--adapter= b c", "--weight=0.5", "--weight=1"]
    assert not any(one.startswith("--prompts") for one in ran.arguments)
    assert ran.arguments[-1] == "--report=parity"


def test_what_is_printed_is_no_command_to_the_runner(tmp_path: Path) -> None:
    log = run_step(tmp_path, step("Verify"), GIVEN, 1).log
    token = re.search(r"^::stop-commands::(exporter-\d+)$", log, re.M)
    assert token is not None
    assert log.index(token.group(0)) < log.index("::error::a tensor's name") < log.index(f"\n::{token.group(1)}::")


def test_a_real_exporter_that_refuses_its_input(tmp_path: Path) -> None:
    program = f'#!/bin/sh\nexec {sys.executable} -m exporter.cli "$@"\n'
    ran = run_step(
        tmp_path, step("Verify"), {"base": "no-base", "adapter": "no-adapter", "bundle": "no-bundle"}, 0, program
    )
    assert ran.code == 4
    assert "    error: " in ran.summary
    assert "no-" in ran.summary


def test_exporter_is_installed_only_where_there_is_none(tmp_path: Path) -> None:
    script = step("Install")["run"]
    assert run_step(tmp_path, {"run": script}, {}, 0).arguments == []  # it is on the PATH
    (tmp_path / "bin" / "python").write_text(FAKE)
    (tmp_path / "bin" / "python").chmod(0o755)
    absent = script.replace("command -v exporter", "command -v exporter-of-nobody")
    assert absent != script
    inputs = {"run": absent, "env": {"GITHUB_ACTION_PATH": "/an action"}}
    arguments = run_step(tmp_path, inputs, {}, 0).arguments
    assert arguments[-3:] == ["-c", "/an action/constraints.txt", "/an action[int8]"]


def test_the_report_is_uploaded_whatever_the_verdict() -> None:
    upload = step("Upload the report")
    assert "always()" in upload["if"]
    assert upload["uses"].startswith("actions/upload-artifact@")
    assert upload["with"]["path"] == "${{ inputs.report || 'parity' }}"


def test_inputs_never_stand_inside_a_script() -> None:
    for one in ACTION["runs"]["steps"]:
        assert "${{" not in one.get("run", "")
        assert "run" not in one or one["shell"] == "bash"
    used = set(re.findall(r"inputs\.([\w-]+)", yaml.safe_dump(ACTION["runs"])))
    assert used == set(ACTION["inputs"])
    assert all(option["description"] for option in ACTION["inputs"].values())


def test_the_github_job_gives_what_the_action_takes() -> None:
    job = JOBS[0]["jobs"]["parity"]
    given = next(one for one in job["steps"] if one.get("uses", "").startswith("OWNER/exporter"))
    required = {name for name, option in ACTION["inputs"].items() if option.get("required")}
    assert required <= set(given["with"]) <= set(ACTION["inputs"])
    outputs = re.findall(r"steps\.parity\.outputs\.([\w-]+)", yaml.safe_dump(job))
    assert set(outputs) == set(ACTION["outputs"])
    assert JOBS[0]["permissions"] == {"contents": "read"}
    for one in job["steps"]:
        assert "${{" not in one.get("run", "")


@pytest.mark.parametrize("code", [0, 1, 3])
def test_the_gitlab_job_ends_as_verify_does_and_keeps_its_report(code: int, tmp_path: Path) -> None:
    job = JOBS[1]["parity"]
    script = "\n".join(line for line in job["script"] if not line.startswith("pip "))
    fake = '#!/bin/sh\nprintf "%s\\n" "$@" >> "$NOTED"\n[ "$1" != verify ] || exit "$ENDS"\n'
    ran = run_step(tmp_path, {"run": script}, {}, code, fake)
    assert ran.code == code
    words = ran.arguments
    report = words[words.index("--report") + 1]
    assert job["artifacts"]["when"] == "always"
    assert job["artifacts"]["reports"]["junit"] == f"{report}/junit.xml"
    assert job["artifacts"]["paths"] == [f"{report}/"]
    assert words[words.index("merge") :][:1] == ["merge"]
    assert words[words.index("export") + 1] == words[words.index("--out") + 1]


def test_both_jobs_use_flags_that_exist() -> None:
    commands = [
        line
        for job in JOBS
        for line in re.findall(r"exporter (?:merge|export|verify) [^\n]*", yaml.safe_dump(job, width=10000))
    ]
    commands += re.findall(r"^exporter [^\n|]*", (ROOT / "docs" / "ci.md").read_text(), re.M)
    assert len(commands) >= 5
    for command in commands:
        name = command.split()[1]
        done = subprocess.run([sys.executable, "-m", "exporter.cli", name, "--help"], capture_output=True, text=True)
        for flag in re.findall(r"--[a-z-]+", command):
            assert flag in done.stdout, command
