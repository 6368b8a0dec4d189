"""JUnit XML: a suite per bundle and pair, a case per statistic. Inconclusive is an error, never `skipped`."""

from collections import defaultdict
from xml.etree import ElementTree

from exporter.parity.result import BundleResult, GateResult, Mutant, Verification
from exporter.report.figures import bundle_name, figure


def junit_xml(verification: Verification) -> bytes:
    """The document, UTF-8. Figures that are only recorded appear as passed cases with their value in system-out."""
    root = ElementTree.Element("testsuites", name="exporter verify")
    for bundle in verification.bundles:
        groups: dict[str, list[GateResult]] = defaultdict(list)
        for gate in bundle.gates:
            groups[gate.pair].append(gate)
        for pair, gates in groups.items():
            _suite(root, f"{bundle_name(bundle)} {pair}", [_gate_case(pair, gate) for gate in gates])
        _suite(root, f"{bundle_name(bundle)} mutants", [_mutant_case(mutant) for mutant in bundle.mutants])
        _suite(root, f"{bundle_name(bundle)} verdict", [_verdict_case(bundle)])
    for attribute in ("tests", "failures", "errors"):
        root.set(attribute, str(sum(int(suite.get(attribute, "0")) for suite in root)))
    root.set("time", str(verification.inputs.seconds))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"


def _suite(root: ElementTree.Element, name: str, cases: list[ElementTree.Element]) -> None:
    suite = ElementTree.SubElement(root, "testsuite", name=name, tests=str(len(cases)), skipped="0", time="0")
    suite.set("failures", str(sum(case.find("failure") is not None for case in cases)))
    suite.set("errors", str(sum(case.find("error") is not None for case in cases)))
    suite.extend(cases)


def _gate_case(pair: str, gate: GateResult) -> ElementTree.Element:
    case = _case(f"exporter.{pair}", f"{gate.gate} {gate.statistic} [{gate.scope}]")
    text = (
        f"{gate.statistic} = {figure(gate.estimate)} [{figure(gate.lower)}, {figure(gate.upper)}], "
        f"limit {figure(gate.limit)} ({gate.bound}), {gate.tokens} tokens of {gate.documents} documents. {gate.detail}"
    ).strip()
    _outcome(case, gate.outcome, text)
    return case


def _mutant_case(mutant: Mutant) -> ElementTree.Element:
    case = _case("exporter.mutants", mutant.name)
    text = f"{mutant.outcome}; expected to die by {', '.join(mutant.expected)}; {mutant.detail}"
    _outcome(case, "INCONCLUSIVE" if mutant.outcome == "survived" else "PASS", text)
    return case


def _verdict_case(bundle: BundleResult) -> ElementTree.Element:
    case = _case("exporter.verdict", "verdict")
    facts = [
        f"correctness {bundle.correctness}",
        *([f"quality {bundle.quality}"] if bundle.quality else []),
        *bundle.notes,
    ]
    _outcome(case, bundle.verdict, "; ".join(facts))
    return case


def _case(classname: str, name: str) -> ElementTree.Element:
    return ElementTree.Element("testcase", classname=classname, name=name, time="0")


def _outcome(case: ElementTree.Element, outcome: str, text: str) -> None:
    text = "".join(character for character in text if character.isprintable() or character in "\n\t")
    if outcome == "FAIL":
        ElementTree.SubElement(case, "failure", message=text, type="FAIL").text = text
    elif outcome == "INCONCLUSIVE":
        ElementTree.SubElement(case, "error", message=text, type="INCONCLUSIVE").text = text
    else:
        ElementTree.SubElement(case, "system-out").text = text
