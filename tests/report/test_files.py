"""JSON with its schema, JUnit, Markdown: for machines and for a CI job's page."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from jsonschema import Draft202012Validator

import exporter
from exporter import cli, parity
from exporter.errors import EnvironmentLacking, InputRefused, UsageError
from exporter.parity.gates import load_thresholds
from exporter.parity.result import Verification
from exporter.report import prepare_directory, write_report
from exporter.report.advice import FOLLOWS, advice, steps
from exporter.report.figures import STATISTICS, beyond, bundle_names, figure, used
from exporter.report.junit import junit_xml
from exporter.report.markdown import markdown_summary
from exporter.report.schema import PUBLISHED, adapter, text


def validator() -> Draft202012Validator:
    schema = json.loads(PUBLISHED.read_text())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def test_the_published_schema_is_the_types() -> None:
    assert PUBLISHED.read_text() == text(), (
        "run: python -m exporter.report.schema > exporter/report/verification.schema.json"
    )


@pytest.mark.parametrize("name", ["failing", "passing", "unsure", "empty"])
def test_every_document_follows_the_schema(name: str, request: pytest.FixtureRequest) -> None:
    verification: Verification = request.getfixturevalue(name)
    assert [error.message for error in validator().iter_errors(json.loads(verification.to_json()))] == []
    assert adapter().validate_json(verification.to_json()) == verification


@pytest.mark.parametrize(
    "change", [{"verdict": "MAYBE"}, {"extra": 1}, {"schema_version": 0}, {"bundles": [{}]}, {"inputs": None}]
)
def test_the_schema_refuses_what_is_not_one(change: dict[str, Any], passing: Verification) -> None:
    assert not validator().is_valid(json.loads(passing.to_json()) | change)


@pytest.mark.parametrize("key", ["verdict", "bundles", "inputs", "environment", "schema_version"])
def test_the_schema_misses_what_is_missing(key: str, passing: Verification) -> None:
    document = json.loads(passing.to_json())
    del document[key]
    assert not validator().is_valid(document)


def test_infinity_never_reaches_the_document(passing: Verification) -> None:
    broken = replace(passing, inputs=replace(passing.inputs, seconds=float("inf")))
    with pytest.raises(ValueError, match="JSON"):
        broken.to_json()


def test_junit_counts_failures_and_errors_and_skips_nothing(failing: Verification, unsure: Verification) -> None:
    root = ElementTree.fromstring(junit_xml(failing))
    cases = root.findall("./testsuite/testcase")
    assert int(root.get("tests", "0")) == len(cases)
    assert int(root.get("failures", "0")) == len(root.findall(".//failure")) == 2  # the gate and the verdict
    assert int(root.get("errors", "0")) == len(root.findall(".//error")) == 1  # the surviving mutant
    assert not root.findall(".//skipped")
    for suite in root:
        assert int(suite.get("tests", "-1")) == len(suite.findall("testcase"))
        assert suite.get("skipped") == "0"
    failure = root.find(".//failure")
    assert failure is not None
    assert "error of the adapter's share = 0.5" in (failure.get("message") or "")
    assert "limit 0.02" in (failure.get("message") or "")
    root = ElementTree.fromstring(junit_xml(unsure))
    assert (root.get("failures"), root.get("errors")) == ("0", "2")


ATTRIBUTES = {
    "testsuites": {"name", "tests", "failures", "errors", "time"},
    "testsuite": {"name", "tests", "failures", "errors", "skipped", "time"},
    "testcase": {"classname", "name", "time"},
    "failure": {"message", "type"},
    "error": {"message", "type"},
    "system-out": set(),
}
CHILDREN = {"testsuites": {"testsuite"}, "testsuite": {"testcase"}, "testcase": {"failure", "error", "system-out"}}


@pytest.mark.parametrize("name", ["failing", "passing", "unsure", "empty"])
def test_junit_keeps_to_what_every_consumer_reads(name: str, request: pytest.FixtureRequest) -> None:
    """The common part of Jenkins' junit-10.xsd, pytest's xunit2 and the elements that GitLab documents."""
    root = ElementTree.fromstring(junit_xml(request.getfixturevalue(name)))
    assert root.tag == "testsuites"
    for element in root.iter():
        assert set(element.attrib) == ATTRIBUTES[element.tag]
        assert {child.tag for child in element} <= CHILDREN.get(element.tag, set())
        for attribute in ("tests", "failures", "errors", "skipped"):
            assert element.get(attribute, "0").isdigit()
        assert float(element.get("time", "0")) >= 0
        assert len(element) <= 1 or element.tag != "testcase"
    for attribute in ("tests", "failures", "errors"):
        assert int(root.get(attribute, "-1")) == sum(int(suite.get(attribute, "-1")) for suite in root)


def test_each_case_has_a_name_of_its_own_in_the_whole_file(failing: Verification) -> None:
    """GitLab: of duplicate names only the first is used. A failure behind it would be hidden."""
    first = failing.bundles[0]
    twins = tuple(replace(first, directory=directory) for directory in ("a/v1.2/int8", "b/v1.2/int8", "b/v1.2/int8"))
    alike = tuple(replace(first, directory=directory) for directory in ("v1.0", "v1_0"))
    for bundles in (failing.bundles, twins, alike):
        cases = list(ElementTree.fromstring(junit_xml(replace(failing, bundles=bundles))).iter("testcase"))
        assert len({(case.get("classname"), case.get("name")) for case in cases}) == len(cases) > 20
        assert all((case.get("classname") or "").count(".") == 2 for case in cases)  # product, bundle, pair


def test_an_independent_reader_counts_the_same(failing: Verification, unsure: Verification, tmp_path: Path) -> None:
    junitparser = pytest.importorskip("junitparser", reason="junitparser is not installed")
    for verification, failures, errors in ((failing, 2, 1), (unsure, 0, 2)):
        (tmp_path / "junit.xml").write_bytes(junit_xml(verification))
        document = junitparser.JUnitXml.fromfile(str(tmp_path / "junit.xml"))
        results = [type(result).__name__ for suite in document for case in suite for result in case.result]
        assert results.count("Failure") == document.failures == failures
        assert results.count("Error") == document.errors == errors
        assert "Skipped" not in results
        before = (document.tests, document.failures, document.errors)
        document.update_statistics()
        assert (document.tests, document.failures, document.errors) == before


def test_bundle_names_are_short_and_tell_apart(passing: Verification) -> None:
    one = passing.bundles[0]
    at = lambda *paths: bundle_names([replace(one, directory=path) for path in paths])  # noqa: E731
    assert at("x/merged") == ["merged (float, cpu)"]
    assert at("x/int8", "y/int8") == ["x/int8 (float, cpu)", "y/int8 (float, cpu)"]
    assert at("int8", "x/int8") == ["int8 (float, cpu)", "x/int8 (float, cpu)"]
    assert at("x/int8", "x/int8") == ["x/int8 (float, cpu) #1", "x/int8 (float, cpu) #2"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (None, "–"),
        (1e-4, "0.0001"),
        (2.604e-7, "2.6e-7"),
        (123456.0, "1.23e5"),
        (1e-12, "1e-12"),
        (-3e-10, "-3e-10"),
        (2e20, "2e20"),
        (0.98765, "0.988"),
    ],
)
def test_figures_have_three_digits(value: float | None, text: str) -> None:
    assert figure(value) == text


@pytest.mark.parametrize(
    ("bound", "estimate", "limit", "share", "words"),
    [
        ("upper", 0.5, 0.02, 25.0, "25 x the limit"),
        ("upper", 0.001, 0.0, None, "0.001 against 0"),
        ("upper", -0.2, 0.1, 0.0, "-2 x the limit"),
        ("exact", 0.001, 0.002, 0.5, "0.5 x the limit"),
        ("lower", 0.98, 0.99, 2.0, "0.01 below the limit"),
        ("lower", 0.995, 0.99, 0.5, "0.005 above the limit"),
    ],
)
def test_by_how_much(bound: str, estimate: float, limit: float, share: float | None, words: str, passing: Any) -> None:
    gate = replace(passing.bundles[0].gates[0], bound=bound, estimate=estimate, lower=estimate, upper=estimate)
    gate = replace(gate, limit=limit)
    assert used(gate) == (None if share is None else pytest.approx(share))
    assert beyond(gate) == words


def test_every_gate_says_what_to_do(passing: Verification) -> None:
    sources = "".join(path.read_text() for path in Path(parity.__file__).parent.glob("*.py"))
    known = re.findall(r'"((?:weights|evidence)\.[a-z]+)"', sources)
    assert {"weights.projection", "weights.names", "evidence.distinct"} <= set(known)
    known += [gate.id for gate in load_thresholds().gates] + ["finite"]
    assert {gate.statistic for gate in load_thresholds().gates} <= set(STATISTICS)
    one = passing.bundles[0].gates[0]
    for name in known:
        assert advice(replace(one, gate=name, outcome="FAIL")).endswith(".")
        assert advice(replace(one, gate=name, outcome="INCONCLUSIVE")).endswith(".")
        assert advice(replace(one, gate=name)) == ""


def test_junit_survives_characters_that_xml_forbids(passing: Verification) -> None:
    first = passing.bundles[0]
    odd = replace(first, gates=(replace(first.gates[0], detail="bell \x07 & <b> \ud7ff \x00"),))
    root = ElementTree.fromstring(junit_xml(replace(passing, bundles=(odd,))))
    assert "bell" in (root.findtext(".//system-out") or "")


def test_the_summary_says_verdict_gate_and_by_how_much(failing: Verification, passing: Verification) -> None:
    text = markdown_summary(failing)
    assert text.startswith("# ❌ Parity: FAIL")
    assert "weights.projection" in text
    assert "25 x the limit" in text
    assert "- The error arises in the merge: share 0.5 of the change" in text
    assert "- It stands in block 3." in text
    assert r"- Tensors: h.3.attn.c\_attn.weight." in text
    assert "| int8 | 0.0006 | 0.0009 |" in text
    assert "- The merge is wrong where named" in text
    assert "**Survived:** positions + 1" in text
    assert "96 % of the error from truth to bundle comes from the stored weights (M32 -> F)" in text
    assert "✅ Parity: PASS" in markdown_summary(passing)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count(" | ") for line in rows if "---" not in line} == {6, 2}  # gates; merge bases


def test_the_summary_is_not_broken_by_what_texts_hold(failing: Verification) -> None:
    first = failing.bundles[0]
    odd = replace(first.gates[0], detail="a | b\n<img src=x onerror=alert(1)> `code` *bold* [link](x)")
    hostile = replace(failing, bundles=(replace(first, gates=(odd,), directory="a/we|rd`\nname"),), notes=("<b>\n# x",))
    text = markdown_summary(hostile)
    assert "<img" not in text
    assert "<b>" not in text
    assert "\n# x" not in text
    row = next(line for line in text.splitlines() if line.startswith("| weights"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 8
    assert r"\`code\` \*bold\* \[link\](x)" in row


def test_all_four_files_are_written_and_written_again(tmp_path: Path, failing: Verification) -> None:
    write_report(failing, tmp_path / "parity")
    first = {path.name: path.read_bytes() for path in (tmp_path / "parity").iterdir()}
    assert set(first) == {"verification.json", "junit.xml", "summary.md", "report.html"}
    write_report(failing, tmp_path / "parity")
    assert {path.name: path.read_bytes() for path in (tmp_path / "parity").iterdir()} == first


def test_a_report_is_prepared_before_anything_is_compared(tmp_path: Path, passing: Verification) -> None:
    """A wrong --report is known at once, and a run that is refused leaves no report of an earlier one."""
    write_report(passing, tmp_path / "parity")
    (tmp_path / "parity" / "mine.txt").write_text("kept")
    with pytest.raises(InputRefused):
        exporter.verify(base=tmp_path / "b", adapter=tmp_path / "a", bundle=tmp_path / "o", report=tmp_path / "parity")
    assert [path.name for path in (tmp_path / "parity").iterdir()] == ["mine.txt"]
    (tmp_path / "file").write_text("")
    (tmp_path / "bundle").mkdir()
    for report, message in (("file", "is a file"), ("bundle", "into the bundle"), ("bundle/parity", "into the bundle")):
        with pytest.raises(UsageError, match=message):
            prepare_directory(tmp_path / report, [tmp_path / "bundle"])
    assert list((tmp_path / "bundle").iterdir()) == []
    with pytest.raises(EnvironmentLacking, match="cannot be written"):
        prepare_directory(tmp_path / "file" / "parity", [])


@pytest.mark.parametrize(("name", "code"), [("passing", 0), ("failing", 1), ("unsure", 3)])
def test_json_for_scripts_is_one_document_whatever_the_verdict(
    name: str,
    code: int,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    verification: Verification = request.getfixturevalue(name)
    monkeypatch.setattr(exporter, "verify", lambda **_: verification)
    monkeypatch.setattr("sys.argv", ["exporter", "verify", "--base=b", "--adapter=a", "--bundle=o", "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    document = json.loads(capsys.readouterr().out)
    assert validator().is_valid(document)
    assert document["verdict"] == verification.verdict


def test_what_follows_from_a_wrong_weight_gets_no_advice_of_its_own(passing: Verification) -> None:
    weight, graph, rounding, *_ = (one for one in passing.bundles[0].gates if one.outcome == "PASS")
    assert (weight.gate, graph.gate) == ("weights.projection", "graph.kl")
    wrong = [replace(one, outcome="FAIL") for one in (rounding, graph, weight)]
    assert steps(replace(passing.bundles[0], gates=tuple(wrong))) == [advice(wrong[2]), FOLLOWS]
    assert steps(replace(passing.bundles[0], gates=tuple(wrong[:2]))) == [advice(wrong[0]), advice(wrong[1])]
    assert steps(passing.bundles[0]) == []
