"""`exporter verify`: the comparison, and the report of it."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from exporter.files import disk_errors, lock_directory
from exporter.parity import verify as comparison
from exporter.parity.documents import Level
from exporter.parity.result import Verification
from exporter.progress import SILENT, Progress
from exporter.report import prepare_directory, require_outside, write_report

SCRATCH = ".scratch"


def verify(
    *,
    base: str | Path,
    adapter: str | Path | Sequence[str | Path],
    bundle: str | Path | Sequence[str | Path],
    weight: Sequence[float] = (),
    prompts: str | Path | None = None,
    reference: str | Path = "int8",
    level: Level = "commit",
    report: str | Path | None = None,
    scratch: str | Path | None = None,
    progress: Progress = SILENT,
) -> Verification:
    """Compare bundles with the unmerged model in fp32 (the truth) and in 8 bits (the reference).

    report: where verification.json, junit.xml, summary.md and report.html go. scratch: where logits and hidden states
    lie until the run is done, so that an interrupted one goes on; default `.scratch` in `report`, and without a report
    a temporary directory. Neither may lie in a bundle. The other arguments and the errors are those of
    `exporter.parity.verify.verify`. A difference is no error: see the result's verdict and exit_code.
    """
    bundles = [Path(bundle)] if isinstance(bundle, str | Path) else [Path(one) for one in bundle]
    if scratch is not None:
        require_outside(Path(scratch), bundles, "--scratch")
    if report is not None:
        prepare_directory(Path(report), bundles)
    with nullcontext() if report is None else lock_directory(Path(report)):
        verification = comparison.verify(
            base=base,
            adapter=adapter,
            bundle=bundles,
            weight=weight,
            prompts=prompts,
            reference=reference,
            level=level,
            scratch=scratch or (Path(report) / SCRATCH if report is not None else None),
            progress=progress,
        )
        if report is not None:
            with disk_errors(Path(report)):
                write_report(verification, Path(report))
    return verification
