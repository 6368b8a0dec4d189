"""The captured reference: what it keeps is enough, and another model's or other tokens' file is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from exporter.errors import InputRefused
from exporter.parity.documents import Document
from exporter.parity.reference import (
    Capture,
    CapturedReference,
    LiveReference,
    capture_store,
    check_capture,
    is_capture,
    read_capture,
)
from exporter.parity.scoring import LogitStore
from exporter.parity.statistics import score

V = 2000
FACTS: dict[str, Any] = {"tokens_sha256": "t", "base_files": {"m": "1"}, "adapter_files": {"a": "2"}, "weights": [1.0]}


class Fixed:
    def __init__(self, seed: int, noise: float = 0.0) -> None:
        self.seed, self.noise = seed, noise

    def logits(self, token_ids, /) -> np.ndarray:
        rng = np.random.default_rng(len(token_ids))
        logits = rng.normal(-60, 3, (len(token_ids), V))
        return (logits + self.noise * np.random.default_rng(self.seed).normal(0, 1, logits.shape)).astype(np.float32)


@pytest.fixture
def store(tmp_path: Path) -> LogitStore:
    rng = np.random.default_rng(2)
    documents = [
        Document(i, tuple(rng.integers(0, V, length)), np.array([0] * 5 + [2] * (length - 5), np.uint8))
        for i, length in enumerate((30, 17, 44))
    ]
    store = LogitStore(tmp_path, documents, V)
    store.score("R", Fixed(0, 0.1))
    store.score("O", Fixed(1, 0.05))
    return store


def captured(store: LogitStore, path: Path) -> CapturedReference:
    capture_store(store, path, environment={"device": "cpu"}, **FACTS)
    return CapturedReference(read_capture(path), store.documents)


def test_equal_captures_are_equal_files(store: LogitStore, tmp_path: Path) -> None:
    """Ten times: safetensors' own order of three facts is a random one of six."""
    files = [tmp_path / f"{number}.safetensors" for number in range(10)]
    for file in files:
        captured(store, file)
    assert len({file.read_bytes() for file in files}) == 1


def test_a_capture_measures_what_the_live_reference_measures(store: LogitStore, tmp_path: Path) -> None:
    live, file = LiveReference(store, {}), captured(store, tmp_path / "r.safetensors")
    for document in store.documents:
        for rows in (slice(0, 9), slice(9, len(document.positions))):
            targets = document.targets[rows]
            other = score(store.read("O", document, rows), targets)
            for name in ("pair_to", "pair_from"):
                full = getattr(live.at(document, rows, targets), name)(other)
                coarse = getattr(file.at(document, rows, targets), name)(other)
                # coarsening can only lose: the data-processing inequality
                assert (coarse.kl <= full.kl + 1e-9).all()
                np.testing.assert_allclose(coarse.kl, full.kl, rtol=0.02)
                np.testing.assert_array_equal(coarse.same_top, full.same_top)


def test_a_capture_keeps_the_smallest_sets_that_cover(store: LogitStore, tmp_path: Path) -> None:
    captured(store, tmp_path / "r.safetensors")
    capture = read_capture(tmp_path / "r.safetensors")
    assert len(capture.counts) == store.rows
    first = score(store.read("R", store.documents[0]), store.documents[0].targets).p[0]
    ordered = np.sort(first)[::-1]
    count = int(capture.counts[0])
    assert ordered[:count].sum() >= 0.999 > ordered[: count - 1].sum()
    assert np.exp(capture.tail[0]) == pytest.approx(ordered[count:].sum(), rel=1e-3)


def test_a_nan_of_the_other_side_stays_marked(store: LogitStore, tmp_path: Path) -> None:
    file, document = captured(store, tmp_path / "r.safetensors"), store.documents[1]
    logits = store.read("O", document)
    logits[2, 11] = np.nan
    pair = file.at(document, slice(None), document.targets).pair_to(score(logits, document.targets))
    assert np.flatnonzero(~pair.finite).tolist() == [2]


OTHER: dict[str, Any] = {
    "tokens_sha256": "x",
    "base_files": {"m": "9"},
    "adapter_files": {"a": "9"},
    "weights": [0.5],
    "rows": 3,
    "vocabulary": V + 1,
}


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("tokens_sha256", "other tokens"),
        ("base_files", "another base"),
        ("adapter_files", "another adapter"),
        ("weights", "adapter weights"),
        ("rows", "positions over"),
        ("vocabulary", "positions over"),
    ],
)
def test_another_runs_file_is_refused(store: LogitStore, tmp_path: Path, key: str, said: str) -> None:
    captured(store, tmp_path / "r.safetensors")
    capture = read_capture(tmp_path / "r.safetensors")
    expected: dict[str, Any] = FACTS | {"rows": store.rows, "vocabulary": V}
    check_capture(capture, **expected)
    with pytest.raises(InputRefused, match=said):
        check_capture(capture, **expected | {key: OTHER[key]})


def test_a_reference_without_numbers_is_not_captured(store: LogitStore, tmp_path: Path) -> None:
    class Broken(Fixed):
        def logits(self, token_ids, /) -> np.ndarray:
            logits = super().logits(token_ids)
            logits[-2, 4] = np.nan
            return logits

    store.drop("R")
    store.score("R", Broken(0))
    with pytest.raises(InputRefused, match="NaN or infinity for document 0"):
        captured(store, tmp_path / "r.safetensors")
    assert not (tmp_path / "r.safetensors").exists()


def broken(capture: Capture, defect: str) -> Capture:
    ids, log_p, counts = capture.ids.copy(), capture.log_p.copy(), capture.counts.copy()
    match defect:
        case "a token beyond the vocabulary":
            ids[3] = V
        case "a negative token":
            ids[3] = -1
        case "a token twice":
            ids[1] = ids[0]
        case "NaN":
            log_p[5] = np.nan
        case "no distribution":
            log_p[0] += 0.1
        case "an empty position":
            counts[:2] = 0, counts[0] + counts[1]
        case "a token without a position":
            ids, log_p = np.append(ids, 7).astype(np.int32), np.append(log_p, -30).astype(np.float32)
        case "more probabilities than tokens":
            log_p = np.append(log_p, -30).astype(np.float32)
    return replace(capture, ids=ids, log_p=log_p, counts=counts)


@pytest.mark.parametrize(
    "defect",
    [
        "a token beyond the vocabulary",
        "a negative token",
        "a token twice",
        "NaN",
        "no distribution",
        "an empty position",
        "a token without a position",
        "more probabilities than tokens",
    ],
)
def test_values_that_are_no_distributions_are_refused(store: LogitStore, tmp_path: Path, defect: str) -> None:
    path = tmp_path / "r.safetensors"
    captured(store, path)
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    wrong = broken(read_capture(path), defect)
    tensors = {name: getattr(wrong, name) for name in ("ids", "log_p", "counts", "tail")}
    save_file(tensors, path, metadata)
    with pytest.raises(InputRefused, match="not a reference"):
        read_capture(path)


@pytest.mark.parametrize("vocabulary", [10**30, 0, -1, 2.5, "many"])
def test_an_absurd_vocabulary_is_refused(store: LogitStore, tmp_path: Path, vocabulary: object) -> None:
    path = tmp_path / "r.safetensors"
    captured(store, path)
    with safe_open(path, "np") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    facts = json.loads(metadata["facts"]) | {"vocabulary": vocabulary}
    save_file(tensors, path, metadata | {"facts": json.dumps(facts)})
    with pytest.raises(InputRefused, match="not a reference"):
        read_capture(path)


def test_a_capture_of_another_version_is_one_that_may_be_replaced(store: LogitStore, tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    captured(store, path)
    with safe_open(path, "np") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata | {"format": "1"})
    with pytest.raises(InputRefused, match="capture it again"):
        read_capture(path)
    assert is_capture(path)
    save_file(tensors, path, {"format": "pt"})
    assert not is_capture(path)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_a_file_that_is_no_capture_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r").write_bytes(content)
    with pytest.raises(InputRefused, match="not a reference"):
        read_capture(tmp_path / "r")
    with pytest.raises(InputRefused, match="no reference file"):
        read_capture(tmp_path / "none")
