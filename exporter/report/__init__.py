"""What a verification looks like: JSON with a schema, JUnit, Markdown, and one HTML page."""

from exporter.report.write import prepare_directory, require_outside, write_report

__all__ = ["prepare_directory", "require_outside", "write_report"]
