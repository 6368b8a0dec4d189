"""JSON with its schema, JUnit, Markdown: for machines and for a CI job's page."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from pydantic import ValidationError

from exporter.parity.result import Verification
from exporter.report import write_report
from exporter.report.junit import junit_xml
from exporter.report.markdown import markdown_summary
from exporter.report.schema import PUBLISHED, adapter, text


def conforms(value: Any, schema: dict[str, Any], root: dict[str, Any], path: str = "$") -> list[str]:
    """A JSON Schema check of the keywords that the published schema uses; anything else is a fault of its own."""
    known = {"$defs", "$schema", "$ref", "additionalProperties", "anyOf", "const", "description", "enum", "items"}
    known |= {"properties", "required", "title", "type", "default", "minItems", "maxItems", "prefixItems"}
    faults = [f"{path}: keyword {key}" for key in schema.keys() - known]
    if "$ref" in schema:
        return faults + conforms(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root, path)
    if "anyOf" in schema:
        tried = [conforms(value, option, root, path) for option in schema["anyOf"]]
        return faults + ([] if any(not one for one in tried) else min(tried, key=len))
    if "const" in schema and value != schema["const"]:
        faults.append(f"{path}: {value!r} is not {schema['const']!r}")
    if "enum" in schema and value not in schema["enum"]:
        faults.append(f"{path}: {value!r} is none of {schema['enum']}")
    types = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "null": type(None)}
    if "type" in schema and (not isinstance(value, types[schema["type"]]) or isinstance(value, bool)):
        return [*faults, f"{path}: {value!r} is no {schema['type']}"]
    if isinstance(value, list):
        for i, item in enumerate(value):
            faults += conforms(item, schema["items"], root, f"{path}[{i}]")
    if isinstance(value, dict):
        faults += [f"{path}: {key} is missing" for key in schema.get("required", []) if key not in value]
        extra = schema.get("additionalProperties", True)
        for key, item in value.items():
            inner = schema.get("properties", {}).get(key, extra)
            if inner is False:
                faults.append(f"{path}: {key} is unknown")
            elif isinstance(inner, dict):
                faults += conforms(item, inner, root, f"{path}.{key}")
    return faults


def test_the_published_schema_is_the_types() -> None:
    assert PUBLISHED.read_text() == text(), (
        "run: python -m exporter.report.schema > exporter/report/verification.schema.json"
    )


@pytest.mark.parametrize("name", ["failing", "passing", "unsure", "empty"])
def test_every_document_follows_the_schema(name: str, request: pytest.FixtureRequest) -> None:
    verification: Verification = request.getfixturevalue(name)
    schema = json.loads(PUBLISHED.read_text())
    document = json.loads(verification.to_json())
    assert conforms(document, schema, schema) == []
    assert adapter().validate_json(verification.to_json()) == verification


def test_the_schema_refuses_what_is_not_one(passing: Verification) -> None:
    schema = json.loads(PUBLISHED.read_text())
    for change in ({"verdict": "MAYBE"}, {"extra": 1}, {"schema_version": 2}, {"bundles": [{}]}):
        document = json.loads(passing.to_json()) | change
        assert conforms(document, schema, schema), change
    with pytest.raises(ValidationError):
        adapter().validate_python(json.loads(passing.to_json()) | {"verdict": "MAYBE"})


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
    assert "projection = 0.5" in (failure.get("message") or "")
    assert "limit 0.02" in (failure.get("message") or "")
    root = ElementTree.fromstring(junit_xml(unsure))
    assert (root.get("failures"), root.get("errors")) == ("0", "2")


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
    assert "**Survived:** positions + 1" in text
    assert "storing the weights (M32 -> F) carries 96 % of the error" in text
    assert "✅ Parity: PASS" in markdown_summary(passing)
    widths = {line.count(" | ") for line in text.splitlines() if line.startswith("|") and "---" not in line}
    assert widths == {6}


def test_all_four_files_are_written_and_written_again(tmp_path: Path, failing: Verification) -> None:
    write_report(failing, tmp_path / "parity")
    first = {path.name: path.read_bytes() for path in (tmp_path / "parity").iterdir()}
    assert set(first) == {"verification.json", "junit.xml", "summary.md", "report.html"}
    write_report(failing, tmp_path / "parity")
    assert {path.name: path.read_bytes() for path in (tmp_path / "parity").iterdir()} == first
