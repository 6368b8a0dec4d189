"""JUnit XML: a suite per bundle and pair, a case per statistic. Inconclusive is an error, never `skipped`.

The element order and the attributes are those that Jenkins, GitLab and pytest agree on. GitLab keeps only the first of
several cases with one class name and name, across the whole file: each case has its own.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from xml.etree import ElementTree

from exporter.parity.result import BundleResult, GateResult, Mutant, Verification
from exporter.report.advice import SURVIVED, advice, steps
from exporter.report.figures import bundle_names, figure, statistic_name, where


def junit_xml(verification: Verification) -> bytes:
    """The document, UTF-8. Figures that are only recorded appear as passed cases with their value in system-out."""
    root = ElementTree.Element("testsuites", name="exporter verify")
    names = bundle_names(verification.bundles)
    for name, package, bundle in zip(names, _packages(names), verification.bundles, strict=True):
        groups: dict[str, list[GateResult]] = defaultdict(list)
        for gate in bundle.gates:
            groups[gate.pair].append(gate)
        for pair, gates in groups.items():
            _suite(root, f"{name} {pair}", [_gate_case(f"{package}.{pair}", gate) for gate in gates])
        if bundle.mutants:
            _suite(root, f"{name} mutants", [_mutant_case(f"{package}.mutants", mutant) for mutant in bundle.mutants])
        _suite(root, f"{name} verdict", [_verdict_case(f"{package}.verdict", bundle)])
    for attribute in ("tests", "failures", "errors"):
        root.set(attribute, str(sum(int(suite.get(attribute, "0")) for suite in root)))
    root.set("time", f"{verification.inputs.seconds:.3f}")
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"


def _packages(names: Sequence[str]) -> list[str]:
    """A package for each bundle, all different. A dot would split one."""
    plain = ["exporter." + re.sub(r"[^\w/-]+", "_", name).strip("_") for name in names]
    if len(set(plain)) == len(plain):
        return plain
    return [f"{name}_{i}" for i, name in enumerate(plain, start=1)]


def _suite(root: ElementTree.Element, name: str, cases: list[ElementTree.Element]) -> None:
    suite = ElementTree.SubElement(root, "testsuite", name=_legal(name), tests=str(len(cases)), skipped="0", time="0")
    suite.set("failures", str(sum(case.find("failure") is not None for case in cases)))
    suite.set("errors", str(sum(case.find("error") is not None for case in cases)))
    suite.extend(cases)


def _gate_case(classname: str, gate: GateResult) -> ElementTree.Element:
    case = _case(classname, f"{gate.gate} {gate.statistic} [{gate.scope}]")
    bounds = f" [{figure(gate.lower)}, {figure(gate.upper)}]" if gate.lower is not None else ""
    limit = "" if gate.limit is None else f", limit {figure(gate.limit)} ({gate.bound})"
    counted = f", {gate.tokens} tokens of {gate.documents} documents" if gate.documents else ""
    facts = f"{statistic_name(gate.statistic)} = {figure(gate.estimate)}{bounds}{limit}{counted}. {gate.detail}"
    _outcome(case, gate.outcome, facts.strip(), advice(gate))
    return case


def _mutant_case(classname: str, mutant: Mutant) -> ElementTree.Element:
    case = _case(classname, mutant.name)
    survived = mutant.outcome == "survived"
    facts = f"{mutant.outcome}; expected to die by {', '.join(mutant.expected)}; {mutant.detail}"
    _outcome(case, "INCONCLUSIVE" if survived else "PASS", facts, SURVIVED if survived else "")
    return case


def _verdict_case(classname: str, bundle: BundleResult) -> ElementTree.Element:
    case = _case(classname, "verdict")
    facts = [
        f"correctness {bundle.correctness}",
        *([f"quality {bundle.quality}"] if bundle.quality else []),
        *bundle.notes,
    ]
    _outcome(case, bundle.verdict, "; ".join(facts), " ".join([*where(bundle), *steps(bundle)]))
    return case


def _case(classname: str, name: str) -> ElementTree.Element:
    return ElementTree.Element("testcase", classname=_legal(classname), name=_legal(name), time="0")


def _outcome(case: ElementTree.Element, outcome: str, facts: str, todo: str) -> None:
    facts = _legal(facts)
    text = f"{facts}\n{_legal(todo)}".strip()
    if outcome == "FAIL":
        ElementTree.SubElement(case, "failure", message=facts, type="FAIL").text = text
    elif outcome == "INCONCLUSIVE":
        ElementTree.SubElement(case, "error", message=facts, type="INCONCLUSIVE").text = text
    else:
        ElementTree.SubElement(case, "system-out").text = text


def _legal(text: str) -> str:
    """`text` without what XML 1.0 has no way to write."""
    return "".join(character for character in text if character.isprintable() or character in "\n\t")
