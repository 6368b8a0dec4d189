"""`exporter capture`: the 8-bit reference as a file, for machines that cannot run it."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exporter.errors import UsageError
from exporter.files import disk_errors, lock_directory, removed_if_empty
from exporter.merging.card import choose_template
from exporter.parity.companions import pair_template
from exporter.parity.documents import Level, tokens_sha256
from exporter.parity.inputs import make_documents, open_pair, resolve_pair
from exporter.parity.models import TorchScorer, load_reference, reference_environment
from exporter.parity.outliers import OUTLIERS, count_outlier_columns
from exporter.parity.reference import capture_store, is_capture
from exporter.parity.scoring import LogitStore
from exporter.progress import SILENT, Progress
from exporter.sources.unchanged import require_unchanged, watch_all


@dataclass(frozen=True, slots=True)
class Captured:
    """The file that `capture` wrote."""

    path: Path
    documents: int
    positions: int
    nbytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"path": str(self.path)}


def capture(
    *,
    base: str | Path,
    adapter: str | Path | Sequence[str | Path],
    out: str | Path,
    weight: Sequence[float] = (),
    prompts: str | Path | None = None,
    level: Level = "commit",
    template: str | None = None,
    progress: Progress = SILENT,
) -> Captured:
    """Run the 8-bit reference and write it to `out` (safetensors), for `verify(reference=out)`.

    `prompts`, `level` and the chat template (a name or text; default: the adapter's, else the base's) must be those of
    the later run, which refuses a file made from other tokens. Equal inputs, versions and processors give equal bytes
    (bitsandbytes on a CPU, whatever the number of threads; not tried on a GPU). Raises UsageError where `out` is
    something else.
    """
    path = Path(out)
    _refuse_foreign_file(path)
    resolved, weighted = resolve_pair(base, adapter, weight, progress)
    watched = watch_all([resolved, *(source for source, _ in weighted)])
    with (
        removed_if_empty(path.parent),
        lock_directory(path.parent),  # before the work: a second process would write under the same partial name
        disk_errors(path.parent),
        tempfile.TemporaryDirectory(prefix="exporter-capture-") as scratch,
    ):
        pair = open_pair(resolved, weighted, progress)
        text = choose_template(template, []) if template else pair_template(pair)
        documents, _ = make_documents(pair, Path(prompts) if prompts else None, level, text)
        store = LogitStore(Path(scratch), documents, pair.vocabulary)
        model = load_reference(pair.base, pair.weighted, pair.rows)
        outliers = count_outlier_columns(model, documents[0].tokens)
        store.score("R", TorchScorer(model), progress)
        require_unchanged(watched)
        capture_store(
            store,
            path,
            tokens_sha256=tokens_sha256(documents),
            base_files=pair.base_files,
            adapter_files=pair.adapter_files,
            weights=[weight for _, weight in pair.weighted],
            environment=reference_environment() | {OUTLIERS: outliers},
        )
    return Captured(path, len(documents), store.rows, path.stat().st_size)


def _refuse_foreign_file(path: Path) -> None:
    """A file that is no capture is not written over."""
    if path.is_dir():
        raise UsageError(f"{path} is a directory", expected="a file", todo="choose another --out")
    if path.exists() and not is_capture(path):
        raise UsageError(
            f"{path} is there and is no capture",
            expected="a new file or an earlier capture",
            todo="choose another --out",
        )
