"""Structured logs: one JSON object a line."""

import json
import threading
import traceback
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

Level = Literal["info", "warning", "error"]


@dataclass(frozen=True, slots=True)
class JsonLog:
    """`stream` None: silent. `quiet`: warnings and errors only. A stream that cannot be written to is given up on."""

    stream: TextIO | None
    quiet: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def write(self, level: Level, event: str, **fields: Any) -> None:
        if self.stream is None or (self.quiet and level == "info"):
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        known = {key: value for key, value in fields.items() if value is not None}
        line = json.dumps({"time": now, "level": level, "event": event} | known)
        with self._lock:
            try:
                self.stream.write(line + "\n")
                self.stream.flush()
            except (OSError, ValueError):  # a closed pipe or file must not stop the server
                pass

    def defect(self, error: BaseException, **fields: Any) -> None:
        """What nobody foresaw, with where it came from: one line."""
        self.write(
            "error",
            "internal_error",
            **fields,
            exception=type(error).__name__,
            message=str(error),
            traceback="".join(traceback.format_exception(error)),
        )
