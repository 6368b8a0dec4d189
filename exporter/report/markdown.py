"""A summary for a CI job's page."""

from exporter.parity.result import BundleResult, GateResult, Verification
from exporter.report.advice import steps
from exporter.report.figures import (
    beyond,
    bundle_names,
    deciding_bound,
    figure,
    judged,
    killed,
    largest_stage,
    source_name,
    statistic_name,
    telling,
    where,
)

MARKS = {"PASS": "✅", "FAIL": "❌", "INCONCLUSIVE": "⚠️"}
ROWS = 12


def markdown_summary(verification: Verification) -> str:
    """GitHub-flavoured Markdown: the verdict, then per bundle what decided it. Texts of others are escaped."""
    inputs = verification.inputs
    adapters = ", ".join(_code(source_name(adapter)) for adapter in inputs.adapters)
    lines = [
        f"# {MARKS[verification.verdict]} Parity: {verification.verdict}",
        "",
        f"Base {_code(source_name(inputs.base))}, adapter {adapters}, reference {inputs.reference}, "
        f"level {inputs.level}: {inputs.documents} documents, {inputs.response_tokens} response, "
        f"{inputs.prompt_tokens} prompt and {inputs.text_tokens} text tokens, {inputs.seconds:.0f} s.",
        "",
        *(f"> {_text(note)}\n" for note in verification.notes),
    ]
    for name, bundle in zip(bundle_names(verification.bundles), verification.bundles, strict=True):
        lines += _bundle(name, bundle)
    if verification.merge_bases is not None and verification.merge_bases.bases:
        lines += ["## Merge onto which base", "", "| onto | KL to the 8-bit reference | KL to the fp32 truth |"]
        lines += ["| --- | ---: | ---: |"]
        for base in verification.merge_bases.bases:
            lines.append(f"| {base.onto} | {figure(base.to_reference)} | {figure(base.to_truth)} |")
        lines.append("")
    return "\n".join(lines)


def _bundle(name: str, bundle: BundleResult) -> list[str]:
    dead, applied = killed(bundle)
    quality = f", quality {bundle.quality}" if bundle.quality else ""
    lines = [
        f"## {MARKS[bundle.verdict]} {_text(name)}: {bundle.verdict}",
        "",
        f"Correctness {bundle.correctness}{quality}. {len(judged(bundle))} gates, {dead} of {applied} mutants killed. "
        f"{largest_stage(bundle)}.",
        "",
        *(f"> {_text(note)}\n" for note in bundle.notes),
        "| gate | pair | tokens | figure | bound | limit | verdict |",
        "| --- | --- | --- | ---: | ---: | ---: | --- |",
    ]
    shown = telling(bundle)
    lines += [_row(gate) for gate in shown[:ROWS]]
    if len(shown) > ROWS:
        lines += ["", f"and {len(shown) - ROWS} more, in report.html."]
    if bundle.verdict != "PASS":
        lines += ["", "**Where it comes from**", "", *(f"- {_text(sentence)}" for sentence in where(bundle))]
    survivors = [mutant.name for mutant in bundle.mutants if mutant.outcome == "survived"]
    if survivors:
        lines += ["", f"**Survived:** {', '.join(survivors)}. A check that misses these proves nothing."]
    todo = steps(bundle)
    if todo:
        lines += ["", "**What to do**", "", *(f"- {step}" for step in todo)]
    return [*lines, ""]


def _row(gate: GateResult) -> str:
    why = [beyond(gate) if gate.outcome == "FAIL" else "", gate.detail]
    verdict = ": ".join([f"{MARKS.get(gate.outcome, '')} {gate.outcome}", "; ".join(filter(None, why))]).strip(": ")
    numbers = [figure(gate.estimate), figure(deciding_bound(gate)), figure(gate.limit)]
    cells = [f"{gate.gate}: {statistic_name(gate.statistic)}", gate.pair, gate.scope, *numbers, verdict]
    return f"| {' | '.join(_text(cell) for cell in cells)} |"


def _text(text: str) -> str:
    """Text as it is read: no markup, no cell or line of its own."""
    flat = " ".join(text.replace("&", "&amp;").replace("<", "&lt;").split())
    for sign in "\\`*_[]|~":
        flat = flat.replace(sign, "\\" + sign)
    return flat


def _code(text: str) -> str:
    """Text in a code span; a code span knows no escapes, so that backticks and bars go."""
    return f"`{' '.join(text.replace('`', ' ').replace('|', ' ').split())}`"
