"""A summary for a CI job's page."""

from pathlib import Path

from exporter.parity.result import BundleResult, GateResult, Verification
from exporter.report.figures import beyond, bundle_name, figure, judged, killed, largest_stage, statistic_name, telling

MARKS = {"PASS": "✅", "FAIL": "❌", "INCONCLUSIVE": "⚠️"}


def markdown_summary(verification: Verification) -> str:
    """GitHub-flavoured Markdown: the verdict, then per bundle what decided it."""
    inputs = verification.inputs
    lines = [
        f"# {MARKS[verification.verdict]} Parity: {verification.verdict}",
        "",
        f"Base `{Path(inputs.base).name}`, adapter {', '.join(f'`{Path(a).name}`' for a in inputs.adapters)}, "
        f"reference {inputs.reference}, level {inputs.level}: {inputs.documents} documents, "
        f"{inputs.response_tokens} response, {inputs.prompt_tokens} prompt and {inputs.text_tokens} text tokens, "
        f"{inputs.seconds:.0f} s.",
        "",
        *(f"> {note}\n" for note in verification.notes),
    ]
    for bundle in verification.bundles:
        lines += _bundle(bundle)
    return "\n".join(lines)


def _bundle(bundle: BundleResult) -> list[str]:
    dead, applied = killed(bundle)
    quality = f", quality {bundle.quality}" if bundle.quality else ""
    lines = [
        f"## {MARKS[bundle.verdict]} {bundle_name(bundle)}: {bundle.verdict}",
        "",
        f"Correctness {bundle.correctness}{quality}. {len(judged(bundle))} gates, {dead} of {applied} mutants killed; "
        f"{largest_stage(bundle)}.",
        "",
        *(f"> {note}\n" for note in bundle.notes),
        "| gate | pair | tokens | figure | bound | limit | verdict |",
        "| --- | --- | --- | ---: | ---: | ---: | --- |",
    ]
    lines += [_row(gate) for gate in telling(bundle)[:12]]
    survivors = [mutant.name for mutant in bundle.mutants if mutant.outcome == "survived"]
    if survivors:
        lines += ["", f"**Survived:** {', '.join(survivors)}. A check that misses these proves nothing."]
    return [*lines, ""]


def _row(gate: GateResult) -> str:
    bound = gate.upper if gate.bound == "upper" else gate.lower if gate.bound == "lower" else gate.estimate
    why = [beyond(gate) if gate.outcome == "FAIL" else "", gate.detail]
    verdict = " – ".join([f"{MARKS.get(gate.outcome, '')} {gate.outcome}", *filter(None, why)])
    numbers = [figure(gate.estimate), figure(bound), figure(gate.limit)]
    cells = [f"{gate.gate}: {statistic_name(gate.statistic)}", gate.pair, gate.scope, *numbers, verdict]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
