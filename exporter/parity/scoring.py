"""Logits of one model at a time, at the scored positions, on disk: no two models need be in memory together."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from exporter.errors import InputRefused
from exporter.files import require_free_space
from exporter.parity.documents import Document
from exporter.progress import SILENT, Progress


class Scorer(Protocol):
    """Any model: float32 logits (T, V) after each of T tokens, from one unpadded call."""

    def logits(self, token_ids: Sequence[int], /) -> NDArray[np.float32]: ...


class LogitStore:
    """float32 (N, vocabulary) per model, N the scored positions of all documents, in files of one directory.

    float32 is what the models compute, so nothing is rounded. `vocabulary` is the real one: padding rows that some
    heads carry behind the tokenizer's last token are cut off.
    """

    def __init__(self, directory: Path, documents: Sequence[Document], vocabulary: int) -> None:
        self.documents, self.vocabulary = documents, vocabulary
        self._directory = directory
        self._starts = np.concatenate([[0], np.cumsum([len(document.positions) for document in documents])])
        self._digests: dict[str, str] = {}

    @property
    def rows(self) -> int:
        return int(self._starts[-1])

    def score(self, model: str, scorer: Scorer, progress: Progress = SILENT) -> None:
        """Run every document through `scorer` and keep its logits at the scored positions."""
        require_free_space(self._directory, self.rows * self.vocabulary * 4, f"logits of {model}")
        digest = hashlib.sha256()
        tokens = sum(len(document.tokens) for document in self.documents)
        with self._path(model).open("wb") as file, progress.task(f"score {model}", tokens, "tokens") as task:
            for document in self.documents:
                logits = np.asarray(scorer.logits(document.tokens), dtype=np.float32)
                if logits.ndim != 2 or len(logits) != len(document.tokens) or logits.shape[1] < self.vocabulary:
                    raise InputRefused(
                        f"{model} gave logits of shape {logits.shape} for {len(document.tokens)} tokens",
                        expected=f"({len(document.tokens)}, {self.vocabulary})",
                    )
                kept = np.ascontiguousarray(logits[document.positions, : self.vocabulary])
                digest.update(kept.data)
                file.write(kept.data)
                task.advance(len(document.tokens))
        self._digests[model] = digest.hexdigest()

    def read(self, model: str, document: Document, rows: slice = slice(None)) -> NDArray[np.float32]:
        """(n, vocabulary) of one document, in the order of its `positions`; `rows` picks some of them."""
        start, stop = self._starts[document.index], self._starts[document.index + 1]
        mapped = np.memmap(self._path(model), np.float32, "r", shape=(self.rows, self.vocabulary))
        return np.array(mapped[start:stop][rows])

    def digest(self, model: str) -> str:
        """SHA-256 of all logits of a model: two models with equal digests are one model."""
        return self._digests[model]

    def drop(self, model: str) -> None:
        self._path(model).unlink(missing_ok=True)
        self._digests.pop(model, None)

    def _path(self, model: str) -> Path:
        return self._directory / f"{model}.f32"
