"""All artefacts of a verification in one directory, each written whole or not at all."""

from pathlib import Path

from exporter.files import write_atomically
from exporter.parity.result import Verification
from exporter.report.html import html_page
from exporter.report.junit import junit_xml
from exporter.report.markdown import markdown_summary


def write_report(verification: Verification, directory: Path) -> None:
    """Write verification.json, junit.xml, summary.md and report.html into `directory`, which is made if needed."""
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / "verification.json", verification.to_json().encode())
    write_atomically(directory / "junit.xml", junit_xml(verification))
    write_atomically(directory / "summary.md", markdown_summary(verification).encode())
    write_atomically(directory / "report.html", html_page(verification).encode())
