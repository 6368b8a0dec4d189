"""Logits of one model at a time, at the scored positions, on disk: no two models need be in memory together.

A run that was interrupted goes on where it stopped: what is complete is kept with a SHA-256 for each document, and is
believed only where the bytes still have it.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from exporter.errors import InputRefused
from exporter.files import disk_errors, partial_path, publish, require_free_space
from exporter.parity.documents import Document
from exporter.progress import SILENT, Progress


class Scorer(Protocol):
    """Any model: float32 logits (T, V) after each of T tokens, from one unpadded call."""

    def logits(self, token_ids: Sequence[int], /) -> NDArray[np.float32]: ...


class LogitStore:
    """float32 (N, vocabulary) per model, N the scored positions of all documents, in files of one directory.

    float32 is what the models compute, so nothing is rounded. `vocabulary` is the real one: padding rows that some
    heads carry behind the tokenizer's last token are cut off. One directory serves one set of documents; `content`
    tells two models of one name apart, such as F of two bundles.
    """

    def __init__(self, directory: Path, documents: Sequence[Document], vocabulary: int) -> None:
        self.directory, self.documents, self.vocabulary = directory, documents, vocabulary
        self._starts = np.concatenate([[0], np.cumsum([len(document.positions) for document in documents])])
        self._digests: dict[str, str] = {}
        self._kept: dict[str, np.memmap] = {}  # (N, vocabulary) float32 of each model

    @property
    def rows(self) -> int:
        return int(self._starts[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of one model's logits."""
        return self.rows * self.vocabulary * 4

    def has(self, model: str, content: str = "") -> bool:
        """True if an earlier run left this model's logits whole and unchanged: then they count as scored."""
        path = self.path(model, content)
        if not path.is_file():
            return False
        digests = self._intact(path, path)
        if len(digests) == len(self.documents):
            self._keep(model, path, digests)
        return len(digests) == len(self.documents)

    def score(self, model: str, scorer: Scorer, progress: Progress = SILENT, content: str = "") -> None:
        """Run every document through `scorer` and keep its logits at the scored positions."""
        path = self.path(model, content)
        partial, journal = partial_path(path), _journal(path)
        digests = self._intact(path, partial) if partial.is_file() else []
        require_free_space(self.directory, self._size(len(digests), len(self.documents)), f"logits of {model}")
        rest = self.documents[len(digests) :]
        tokens = sum(len(document.tokens) for document in rest)
        journal.write_text("".join(f"{digest}\n" for digest in digests))
        with (
            disk_errors(self.directory),
            partial.open("r+b" if digests else "wb") as file,
            journal.open("a") as lines,
            progress.task(f"score {model}", tokens, "tokens") as task,
        ):
            file.truncate(self._size(0, len(digests)))
            file.seek(0, 2)
            for document in rest:
                kept = self._scored(model, scorer, document)
                file.write(kept.data)
                file.flush()
                digests.append(hashlib.sha256(kept.data).hexdigest())
                lines.write(f"{digests[-1]}\n")
                lines.flush()
                task.advance(len(document.tokens))
        publish(partial, path)
        self._keep(model, path, digests)

    def read(self, model: str, document: Document, rows: slice = slice(None)) -> NDArray[np.float32]:
        """(n, vocabulary) of one document, in the order of its `positions`; `rows` picks some of them."""
        start, stop = self._starts[document.index], self._starts[document.index + 1]
        return np.array(self._kept[model][start:stop][rows])

    def digest(self, model: str) -> str:
        """SHA-256 over all logits of a model: two models with equal digests are one model."""
        return self._digests[model]

    def drop(self, model: str) -> None:
        kept = self._kept.pop(model, None)
        self._digests.pop(model, None)
        if kept is not None:
            path = Path(str(kept.filename))
            path.unlink(missing_ok=True)
            _journal(path).unlink(missing_ok=True)

    def path(self, model: str, content: str = "") -> Path:
        """Where the logits of a model stand."""
        return self.directory / f"{model}{f'-{content[:16]}' if content else ''}.f32"

    def _scored(self, model: str, scorer: Scorer, document: Document) -> NDArray[np.float32]:
        logits = np.asarray(scorer.logits(document.tokens), dtype=np.float32)
        if logits.ndim != 2 or len(logits) != len(document.tokens) or logits.shape[1] < self.vocabulary:
            raise InputRefused(
                f"{model} gave logits of shape {logits.shape} for {len(document.tokens)} tokens",
                expected=f"({len(document.tokens)}, {self.vocabulary})",
            )
        return np.ascontiguousarray(logits[document.positions, : self.vocabulary])

    def _intact(self, path: Path, file: Path) -> list[str]:
        """Digests of the first documents in `file` that the journal of `path` vouches for."""
        lines = _journal(path).read_text().split("\n") if _journal(path).is_file() else []
        found: list[str] = []
        with file.open("rb") as stream:
            for digest in lines[: len(self.documents)]:
                data = stream.read(self._size(len(found), len(found) + 1))
                if len(data) < self._size(len(found), len(found) + 1) or hashlib.sha256(data).hexdigest() != digest:
                    break
                found.append(digest)
        return found

    def _size(self, first: int, last: int) -> int:
        """Bytes of the documents from `first` to before `last`."""
        return int(self._starts[last] - self._starts[first]) * self.vocabulary * 4

    def _keep(self, model: str, path: Path, digests: Sequence[str]) -> None:
        self._kept[model] = np.memmap(path, np.float32, "r", shape=(self.rows, self.vocabulary))
        self._digests[model] = hashlib.sha256("".join(digests).encode()).hexdigest()


def _journal(path: Path) -> Path:
    """One line of SHA-256 for each document that is complete."""
    return path.with_suffix(".sha256")
