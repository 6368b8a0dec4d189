"""R, the 8-bit model: run here, or captured elsewhere in a file (`exporter capture`).

A capture keeps, per position, the smallest top-k that covers 99.9 % of the mass (at most 4096) and the mass of the
rest. Both sides of a pair are then coarsened alike: k buckets of one token and one bucket of all others. A fixed
top-256 left 28 % of the mass in the tail of a small model and understated KL by 20 %.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from exporter.errors import InputRefused
from exporter.files import write_atomically
from exporter.json_text import parse_json
from exporter.parity.documents import Document
from exporter.parity.scoring import LogitStore
from exporter.parity.statistics import PairTokens, Scored, compare, log_softmax, score

COVERED = 0.999
LARGEST = 4096
MASS = 1e-3  # off one, at most, by what float32 rounds
LARGEST_VOCABULARY = 1 << 31
FORMAT = "2"  # 1 did not hold the weights of the adapters
ABSENT = -60.0  # log p of a padding bucket on both sides: it adds nothing to any sum

Int = NDArray[np.int64]


class ReferenceRows(Protocol):
    """R at some positions of a document."""

    def pair_to(self, cand: Scored) -> PairTokens:
        """The pair R-cand."""
        ...

    def pair_from(self, ref: Scored) -> PairTokens:
        """The pair ref-R."""
        ...


class Reference(Protocol):
    """R, to be held against other models' views of the same positions."""

    name: str
    environment: dict[str, str]

    def at(self, document: Document, rows: slice, targets: Int) -> ReferenceRows:
        """R at `rows` of the document's scored positions, whose true tokens are `targets`."""
        ...


def require_finite_reference(store: LogitStore) -> None:
    """InputRefused where R's logits are no numbers: there is nothing to compare with then."""
    for document in store.documents:
        if not np.isfinite(store.read("R", document)).all():
            raise InputRefused(
                f"the 8-bit model gives NaN or infinity for document {document.index}",
                expected="finite logits",
                todo="check the base's weights; a base that overflows in float16 has no such reference",
            )


class LiveReference:
    """R was run in this process and its logits are in the store. InputRefused where they are no numbers."""

    name = "int8"

    def __init__(self, store: LogitStore, environment: dict[str, str]) -> None:
        require_finite_reference(store)
        self._store, self.environment = store, environment

    def at(self, document: Document, rows: slice, targets: Int) -> "LiveRows":
        return LiveRows(score(self._store.read("R", document, rows), targets), targets)


@dataclass(frozen=True, slots=True)
class LiveRows:
    """All logits of R at some positions."""

    scored: Scored
    targets: Int

    def pair_to(self, cand: Scored) -> PairTokens:
        return compare(self.scored, cand, self.targets)

    def pair_from(self, ref: Scored) -> PairTokens:
        return compare(ref, self.scored, self.targets)


@dataclass(frozen=True, slots=True)
class Capture:
    """R's distributions: position i holds the next `counts[i]` tokens; `tail` is the log of the mass of the rest."""

    ids: NDArray[np.int32]
    log_p: NDArray[np.float32]
    counts: NDArray[np.int32]
    tail: NDArray[np.float32]
    tokens_sha256: str
    base_files: dict[str, str]
    adapter_files: dict[str, str]
    weights: tuple[float, ...]
    vocabulary: int
    environment: dict[str, str]
    sha256: str


class CapturedReference:
    """R comes from a file; the other side of each pair is coarsened to the file's buckets."""

    def __init__(self, capture: Capture, documents: Sequence[Document]) -> None:
        self.name, self.environment = f"capture {capture.sha256[:16]}", capture.environment
        self._capture = capture
        self._starts = np.concatenate([[0], np.cumsum(capture.counts)])
        self._first = np.concatenate([[0], np.cumsum([len(document.positions) for document in documents])])

    def at(self, document: Document, rows: slice, targets: Int) -> "CapturedRows":
        wanted = range(*rows.indices(len(document.positions)))
        first = int(self._first[document.index])
        return CapturedRows(self._capture, self._starts, slice(first + wanted.start, first + wanted.stop), targets)


@dataclass(frozen=True, slots=True)
class CapturedRows:
    """Buckets of R at some positions: `starts` says where the tokens of a position begin in the capture."""

    capture: Capture
    starts: Int
    positions: slice
    targets: Int

    def pair_to(self, cand: Scored) -> PairTokens:
        ours, theirs, places = self._coarsened(cand)
        return compare(score(theirs, places), _marked(score(ours, places), cand), places)

    def pair_from(self, ref: Scored) -> PairTokens:
        ours, theirs, places = self._coarsened(ref)
        return compare(_marked(score(ours, places), ref), score(theirs, places), places)

    def _coarsened(self, other: Scored) -> tuple[NDArray, NDArray, Int]:
        """(N, k + 1) log probabilities of the other side and of R, and the bucket of each true token."""
        counts, tail = self.capture.counts[self.positions], self.capture.tail[self.positions]
        width = int(counts.max()) + 1
        ours, theirs = np.full((len(counts), width), ABSENT), np.full((len(counts), width), ABSENT)
        places = np.empty(len(counts), np.int64)
        for i, (start, count) in enumerate(zip(self.starts[self.positions], counts, strict=True)):
            ids = self.capture.ids[start : start + count]
            ours[i, :count] = other.log_p[i, ids]
            ours[i, width - 1] = _log_rest(ours[i, :count])
            theirs[i, :count] = self.capture.log_p[start : start + count]
            theirs[i, width - 1] = max(float(tail[i]), ABSENT)
            found = np.flatnonzero(ids == self.targets[i])
            places[i] = found[0] if len(found) else width - 1
        return ours, theirs, places


def capture_store(
    store: LogitStore,
    out: Path,
    *,
    tokens_sha256: str,
    base_files: dict[str, str],
    adapter_files: dict[str, str],
    weights: Sequence[float],
    environment: dict[str, str],
) -> None:
    """Write R's logits of `store` as a capture file (safetensors; the facts are JSON in its metadata).

    InputRefused where R gave no numbers: there is nothing to compare with then.
    """
    require_finite_reference(store)
    ids, log_p, counts, tail = [], [], [], []
    for document in store.documents:
        for row in log_softmax(store.read("R", document)):
            order = np.argsort(-row, kind="stable")[:LARGEST]
            count = min(len(order), int(np.searchsorted(np.cumsum(np.exp(row[order])), COVERED)) + 1)
            ids.append(order[:count].astype(np.int32))
            log_p.append(row[order[:count]].astype(np.float32))
            counts.append(count)
            tail.append(_log_rest(row[order[:count]]))
    facts = {
        "base_files": base_files,
        "adapter_files": adapter_files,
        "weights": list(weights),
        "environment": environment,
        "vocabulary": store.vocabulary,
    }
    tensors = {
        "ids": np.concatenate(ids),
        "log_p": np.concatenate(log_p),
        "counts": np.array(counts, np.int32),
        "tail": np.array(tail, np.float32),
    }
    metadata = {"format": FORMAT, "tokens_sha256": tokens_sha256, "facts": json.dumps(facts, sort_keys=True)}
    write_atomically(out, _sorted_header(save(tensors, metadata)))


def _sorted_header(file: bytes) -> bytes:
    """safetensors writes metadata in the order of a hash map, another one each time."""
    start = 8 + int.from_bytes(file[:8], "little")
    header = json.dumps(json.loads(file[8:start]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + file[start:]


def is_capture(path: Path) -> bool:
    """True for a capture of any version, even one that is refused."""
    try:
        with safe_open(path, "np") as file:
            return (file.metadata() or {}).keys() >= {"format", "tokens_sha256", "facts"}
    except (SafetensorError, OSError):
        return False


def read_capture(path: Path) -> Capture:
    """InputRefused if `path` is no capture file."""
    if not path.is_file():
        raise InputRefused(
            f"there is no reference file {path}", expected='"int8" or a file written by `exporter capture`'
        )
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"format {metadata.get('format')!r}")
            facts = parse_json(metadata["facts"].encode())
            _check_facts(facts)
            capture = Capture(
                file.get_tensor("ids"),
                file.get_tensor("log_p"),
                file.get_tensor("counts"),
                file.get_tensor("tail"),
                metadata["tokens_sha256"],
                facts["base_files"],
                facts["adapter_files"],
                tuple(facts["weights"]),
                facts["vocabulary"],
                facts["environment"],
                hashlib.sha256(path.read_bytes()).hexdigest(),
            )
        _check_distributions(capture)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputRefused(
            f"{path} is not a reference that this version reads ({error})",
            expected="a file written by `exporter capture`",
            todo="capture it again",
        ) from error
    return capture


def _check_distributions(capture: Capture) -> None:
    """ValueError unless each position holds one distribution over the vocabulary."""
    ids, counts = capture.ids, capture.counts
    lists = (("ids", ids, np.integer), ("counts", counts, np.integer), ("log_p", capture.log_p, np.floating))
    for name, values, kind in (*lists, ("tail", capture.tail, np.floating)):
        if values.ndim != 1 or not np.issubdtype(values.dtype, kind) or not np.isfinite(values).all():
            raise ValueError(f"{name} is no list of {'finite ' if kind is np.floating else 'whole '}numbers")
    fitting = len(counts) and counts.min() >= 1 and counts.max() <= len(ids)
    if not fitting or int(counts.sum(dtype=np.int64)) != len(ids):
        raise ValueError("the counts do not fit the tokens")
    if len(capture.log_p) != len(ids) or len(capture.tail) != len(counts):
        raise ValueError("the probabilities do not fit the tokens")
    if ids.min() < 0 or ids.max() >= capture.vocabulary:
        raise ValueError(f"a token is not among the {capture.vocabulary} of the vocabulary")
    position = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    if len(np.unique(position * capture.vocabulary + ids)) != len(ids):
        raise ValueError("a position lists a token twice")
    mass = np.bincount(position, np.exp(capture.log_p.astype(np.float64))) + np.exp(capture.tail.astype(np.float64))
    if not (np.abs(mass - 1) < MASS).all():
        raise ValueError("the probabilities of a position do not sum to one")


def _check_facts(facts: Any) -> None:
    for key in ("base_files", "adapter_files", "environment"):
        if not isinstance(facts[key], dict) or not all(isinstance(value, str) for value in facts[key].values()):
            raise ValueError(f"{key} is no map of texts")
    if not isinstance(facts["vocabulary"], int) or not 0 < facts["vocabulary"] < LARGEST_VOCABULARY:
        raise ValueError("the vocabulary is no number of tokens")
    if not isinstance(facts["weights"], list) or not all(isinstance(one, int | float) for one in facts["weights"]):
        raise ValueError("the weights of the adapters are no numbers")


def check_capture(
    capture: Capture,
    *,
    tokens_sha256: str,
    base_files: dict[str, str],
    adapter_files: dict[str, str],
    weights: Sequence[float],
    rows: int,
    vocabulary: int,
) -> None:
    """InputRefused unless the capture is of this base, these adapters and these tokens, with so many scored `rows`."""
    if sorted(capture.base_files.values()) != sorted(base_files.values()):
        raise InputRefused("the reference was captured with another base", expected="this base's hashes")
    if capture.adapter_files != adapter_files:
        raise InputRefused("the reference was captured with another adapter", expected="this adapter's hashes")
    if capture.weights != tuple(weights):
        raise InputRefused(
            f"the reference was captured with adapter weights {list(capture.weights)}", expected=f"{list(weights)}"
        )
    if capture.tokens_sha256 != tokens_sha256:
        raise InputRefused(
            "the reference was captured on other tokens",
            expected="the same prompts, level, tokenizer and chat template",
            todo="capture it again with the prompts and the level of this run",
        )
    if (len(capture.counts), capture.vocabulary) != (rows, vocabulary):
        raise InputRefused(
            f"the reference has {len(capture.counts)} positions over {capture.vocabulary} tokens",
            expected=f"{rows} positions over {vocabulary}, as its prompts give",
            todo="the file was changed: capture it again",
        )


def _log_rest(log_p: NDArray) -> float:
    """Log of the mass that `log_p` leaves out."""
    rest = -np.expm1(np.log(np.maximum(np.exp(log_p.astype(np.float64)).sum(), 1e-300))) if len(log_p) else 1.0
    return float(np.log(rest)) if rest > np.exp(ABSENT) else ABSENT


def _marked(coarse: Scored, full: Scored) -> Scored:
    """A position whose full logits were not finite stays marked."""
    return replace(coarse, finite=coarse.finite & full.finite)
