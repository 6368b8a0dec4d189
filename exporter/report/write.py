"""All artefacts of a verification in one directory, each written whole or not at all."""

from collections.abc import Sequence
from pathlib import Path

from exporter.errors import EnvironmentLacking, UsageError
from exporter.files import write_atomically
from exporter.parity.result import Verification
from exporter.report.html import html_page
from exporter.report.junit import junit_xml
from exporter.report.markdown import markdown_summary

FILES = ("verification.json", "junit.xml", "summary.md", "report.html")


def prepare_directory(directory: Path, bundles: Sequence[Path]) -> None:
    """Make `directory` before anything is compared, and take an older report away: a run that is refused leaves none.

    UsageError where it is a file, or inside a bundle: verify writes into none. EnvironmentLacking where it cannot be
    written.
    """
    require_outside(directory, bundles, "--report")
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory} is a file", expected="a directory for the report")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (directory / name).unlink(missing_ok=True)
    except OSError as error:
        raise EnvironmentLacking(
            f"the report's directory {directory} cannot be written ({error.strerror})",
            expected="a directory that can be written",
        ) from error


def require_outside(directory: Path, bundles: Sequence[Path], option: str) -> None:
    """UsageError where `directory` lies in a bundle."""
    for bundle in bundles:
        if directory.resolve().is_relative_to(bundle.resolve()):
            raise UsageError(
                f"{option} would write into the bundle {bundle}", expected="a directory outside of every bundle"
            )


def write_report(verification: Verification, directory: Path) -> None:
    """Write verification.json, junit.xml, summary.md and report.html into `directory`, which is made if needed."""
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / "verification.json", verification.to_json().encode())
    write_atomically(directory / "junit.xml", junit_xml(verification))
    write_atomically(directory / "summary.md", markdown_summary(verification).encode())
    write_atomically(directory / "report.html", html_page(verification).encode())
