"""What a verification looks like: JSON with a schema, JUnit, Markdown, and one HTML page."""

from exporter.report.write import write_report

__all__ = ["write_report"]
