"""A Progress that keeps what it is told."""

from exporter.progress import SILENT, TaskContext


class Notes:
    def __init__(self) -> None:
        self.said: list[str] = []

    def task(self, title: str, total: float, unit: str = "") -> TaskContext:
        return SILENT.task(title, total, unit)

    def note(self, message: str) -> None:
        self.said.append(message)
