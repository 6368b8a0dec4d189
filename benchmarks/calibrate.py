"""How near each gate comes to its limit: on even-numbered prompts, on which limits are chosen, and on the odd ones.

python benchmarks/calibrate.py [--base B --adapter A] BUNDLE...      (make calibrate: the demo pair)

A Markdown table on stdout: for every gate of every bundle the deciding bound and the part of the limit that it uses.
"""

import argparse
import tempfile
from pathlib import Path

import exporter
from exporter.demonstration import PAIR
from exporter.parity.documents import PACKAGED
from exporter.parity.result import BundleResult, GateResult, Verification
from exporter.report.figures import deciding_bound, figure, used

HALVES = ("even", "odd")


def verify_half(half: str, base: Path, adapter: Path, bundles: list[Path], directory: Path) -> Verification:
    """Numbered from 0, as the levels do: `commit` takes the odd ones first."""
    lines = (PACKAGED / "alpaca.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    path = directory / f"{half}.jsonl"
    path.write_text("".join(lines[HALVES.index(half) :: 2]), encoding="utf-8")
    return exporter.verify(base=base, adapter=adapter, bundle=bundles, prompts=path, level="nightly")


def judged_figures(bundle: BundleResult) -> dict[tuple[str, str], GateResult]:
    """Gates with a figure, those below their evidence too, by id and scope."""
    return {(g.gate, g.scope): g for g in bundle.gates if g.limit is not None and g.gate != "recorded"}


def rows(halves: list[Verification]) -> list[str]:
    found = []
    for bundles in zip(*(half.bundles for half in halves), strict=True):
        even, odd = map(judged_figures, bundles)
        for key, gate in odd.items():
            if gate.gate.startswith("evidence.") or gate.gate == "finite":
                continue
            cells = [cell for one in (even.get(key), gate) for cell in _cells(one)]
            found.append(
                f"| {bundles[1].format} | {gate.gate} | {gate.scope} | {figure(gate.limit)} | {' | '.join(cells)} |"
            )
    return found


def _cells(gate: GateResult | None) -> tuple[str, str]:
    if gate is None:
        return "–", "–"
    part = used(gate)
    return figure(deciding_bound(gate)), "–" if part is None else f"{100 * part:.2g} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--base", type=Path, default=PAIR / "base")
    parser.add_argument("--adapter", type=Path, default=PAIR / "adapter")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        halves = [
            verify_half(half, arguments.base, arguments.adapter, arguments.bundles, Path(name)) for half in HALVES
        ]
    print("| bundle | gate | scope | limit | even: bound | of the limit | odd: bound | of the limit |")
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(rows(halves)))


if __name__ == "__main__":
    main()
