"""All documents through a model block by block: one block in memory, what lies between the blocks on disk.

Each block's results are complete before they get their name, so that an interrupted run goes on with the next block.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from exporter.files import disk_errors, partial_path, publish, require_free_space
from exporter.parity.blocks import BlockModel, Float32
from exporter.parity.documents import Document
from exporter.progress import SILENT, Progress

SLOW = 5.0  # seconds: a block that takes longer is worth an estimate of the rest


class HiddenStates:
    """float32 (tokens of all documents, E) in one file: what stands before or after one block."""

    def __init__(self, path: Path, documents: Sequence[Document], width: int) -> None:
        self.path = path
        self._documents, self._width = documents, width
        self._starts = np.concatenate([[0], np.cumsum([len(document.tokens) for document in documents])])

    @property
    def nbytes(self) -> int:
        return int(self._starts[-1]) * self._width * 4

    @property
    def is_complete(self) -> bool:
        return self.path.is_file() and self.path.stat().st_size == self.nbytes

    def read(self, document: Document) -> Float32:
        """(T, E) of one document."""
        start, stop = self._starts[document.index], self._starts[document.index + 1]
        shape = (int(self._starts[-1]), self._width)
        return np.array(np.memmap(self.path, np.float32, "r", shape=shape)[start:stop])


class SweptScorer:
    """A Scorer over documents that have been through all blocks: only the head is left to run."""

    def __init__(self, model: BlockModel, states: HiddenStates, documents: Sequence[Document]) -> None:
        self._model, self._states = model, states
        self._documents = {document.tokens: document for document in documents}

    def logits(self, token_ids: Sequence[int], /) -> Float32:
        document = self._documents[tuple(token_ids)]
        return self._model.logits(document.tokens, self._states.read(document))


class BlockScorer:
    """A Scorer that runs any tokens through all blocks: each call loads each block again."""

    def __init__(self, model: BlockModel) -> None:
        self._model = model

    def logits(self, token_ids: Sequence[int], /) -> Float32:
        hidden = self._model.embed(token_ids)
        for block in range(self._model.depth):
            hidden = self._model.run(block, token_ids, hidden)
        return self._model.logits(token_ids, hidden)


def sweep(
    model: BlockModel, documents: Sequence[Document], directory: Path, title: str, progress: Progress = SILENT
) -> HiddenStates:
    """What the last block gives for every document, in `directory`, which holds two states at most.

    Goes on after the last block that an earlier, interrupted sweep of the same model left complete there.
    EnvironmentLacking where the disk is full.
    """
    directory.mkdir(parents=True, exist_ok=True)
    states = [HiddenStates(directory / f"{k:04d}.f32", documents, model.width) for k in range(model.depth + 1)]
    tokens = sum(len(document.tokens) for document in documents)
    done = max((k for k, state in enumerate(states) if state.is_complete), default=-1)
    if done < 0:
        require_free_space(directory, 2 * states[0].nbytes, f"hidden states of {title}")
        _write(states[0], [model.embed(document.tokens) for document in documents])
        done = 0
    elif done:
        progress.note(f"{title}: {done} of {model.depth} blocks are done already")
    with progress.task(f"{title}, block by block", model.depth - done, "blocks") as task:
        for k in range(done, model.depth):
            began = time.monotonic()
            with disk_errors(directory), partial_path(states[k + 1].path).open("wb") as file:
                for document in documents:
                    file.write(model.run(k, document.tokens, states[k].read(document)).tobytes())
                    task.advance(len(document.tokens) / tokens)
            publish(partial_path(states[k + 1].path), states[k + 1].path)
            states[k].path.unlink()
            seconds = time.monotonic() - began
            if k == done and seconds > SLOW and k + 1 < model.depth:
                rest = seconds * (model.depth - k - 1)
                progress.note(f"{title}: a block took {seconds:.0f} s; the rest takes about {rest / 60:.1f} min")
    return states[-1]


def _write(state: HiddenStates, hidden: Sequence[Float32]) -> None:
    with disk_errors(state.path.parent), partial_path(state.path).open("wb") as file:
        for one in hidden:
            file.write(one.tobytes())
    publish(partial_path(state.path), state.path)
