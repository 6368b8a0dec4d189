"""Where a run's intermediate results lie: kept when it is interrupted, for the next run of the same content."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from exporter.files import lock_directory


@contextmanager
def open_scratch(parent: Path | None, facts: Mapping[str, Any]) -> Iterator[Path]:
    """A directory in `parent` that is named by `facts`, all that the results depend on; removed when the work is done.

    Stays on any error or interruption, and is found again by a run with equal facts. A temporary directory, always
    removed, where parent is None. UsageError if another process works there.
    """
    if parent is None:
        with tempfile.TemporaryDirectory(prefix="exporter-verify-") as temporary:
            yield Path(temporary)
        return
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    directory = parent / digest[:16]
    with lock_directory(directory):
        yield directory
        shutil.rmtree(directory)
    if not any(parent.iterdir()):
        parent.rmdir()
