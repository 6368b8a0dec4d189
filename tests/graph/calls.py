"""A graph called as any runtime calls it."""

from pathlib import Path

import numpy as np
import onnxruntime as ort


def session(graph: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class Graph:
    """The cache goes in and comes out, nothing is shared."""

    def __init__(self, graph: Path) -> None:
        self.session = session(graph)
        self.cache = [value for value in self.session.get_inputs() if value.name.startswith("past_key_values")]

    def empty(self, rows: int) -> dict[str, np.ndarray]:
        return {value.name: np.zeros((rows, value.shape[1], 0, value.shape[3]), np.float32) for value in self.cache}

    def __call__(
        self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray, past: dict[str, np.ndarray] | None = None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        logits, *present = self.session.run(None, feeds | (past or self.empty(len(ids))))
        cache = {value.name: np.asarray(array) for value, array in zip(self.cache, present, strict=True)}
        return np.asarray(logits), cache


def one_row(ids: list[int], past: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """input_ids, attention_mask and position_ids of a row alone."""
    return np.array([ids]), np.ones((1, past + len(ids)), np.int64), np.arange(past, past + len(ids))[None]


def padded(rows: list[list[int]], side: str, pad: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same of rows of unequal length."""
    width = max(map(len, rows))
    ids, mask = np.full((len(rows), width), pad), np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        where = slice(width - len(row), None) if side == "left" else slice(len(row))
        ids[i, where], mask[i, where] = row, 1
    return ids, mask, np.maximum(mask.cumsum(1) - 1, 0)
