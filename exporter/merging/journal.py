"""What a merge has finished, so that one that was killed goes on where it stopped.

The journal and the shards stand under `.*.partial` names, which no loader takes for a model, until all is proven. An
entry is written after its shard's bytes are on the disk. A shard counts while its size, time and inode are as noted.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from exporter.files import partial_path, write_atomically
from exporter.manifest import versions
from exporter.merging.proof import Probe, ShardProof
from exporter.merging.stream import WrittenTensor

JOURNAL = ".exporter.merge.partial"


@dataclass(frozen=True, slots=True)
class FinishedShard:
    """A shard that is written, synced and, where that was asked for, proven. proof: None without."""

    written: tuple[WrittenTensor, ...]
    proof: ShardProof | None


class Journal:
    """The finished shards of one request in `directory`; those of another request, or other versions, are forgotten."""

    def __init__(self, directory: Path, request: Mapping[str, Any]) -> None:
        self.directory, self.request = directory, json.loads(json.dumps({**request, "versions": versions()}))
        self._entries: dict[str, dict[str, Any]] = self._read()
        self._adding = Lock()

    @property
    def is_begun(self) -> bool:
        return any(self._place(name, entry) for name, entry in self._entries.items())

    @property
    def nbytes(self) -> int:
        """Bytes of the shards that are finished."""
        return sum(e["stamp"]["size"] for name, e in self._entries.items() if self._place(name, e))

    def finished(self, name: str) -> FinishedShard | None:
        """The shard `name` if it stands unchanged, under its partial name or, after a kill between renames, its own."""
        entry = self._entries.get(name)
        if entry is None or self._place(name, entry) is None:
            return None
        return _shard(entry)

    def add(self, name: str, shard: FinishedShard) -> None:
        """Note that the synced partial file of `name` is what `shard` says."""
        path = partial_path(self.directory / name)
        entry = {
            "stamp": _stamp(path),
            "written": [asdict(tensor) for tensor in shard.written],
            "proof": shard.proof and asdict(shard.proof),
        }
        with self._adding:
            entries = {**self._entries, name: entry}
            text = json.dumps({"request": self.request, "shards": entries})
            write_atomically(self.directory / JOURNAL, text.encode())
            self._entries = entries  # last: what could not be noted is not kept either

    def keeps(self, path: Path) -> bool:
        """True if `path` belongs to a finished shard or is the journal itself."""
        return (path.name == JOURNAL and bool(self._entries)) or any(
            path == self._place(name, entry) for name, entry in self._entries.items()
        )

    def forget(self) -> None:
        """The journal is of no more use: what it kept is either published or refused."""
        self._entries = {}
        (self.directory / JOURNAL).unlink(missing_ok=True)

    def _place(self, name: str, entry: Mapping[str, Any]) -> Path | None:
        final = self.directory / name
        return next((p for p in (partial_path(final), final) if p.is_file() and _stamp(p) == entry["stamp"]), None)

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            text = json.loads((self.directory / JOURNAL).read_bytes())
            if text["request"] != self.request:
                return {}
            entries: dict[str, dict[str, Any]] = text["shards"]
            for entry in entries.values():
                _shard(entry)
                entry["stamp"] = {key: int(entry["stamp"][key]) for key in ("size", "mtime_ns", "inode")}
            return entries
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {}  # none, or not ours: everything is made anew


def _shard(entry: Mapping[str, Any]) -> FinishedShard:
    proof = entry["proof"]
    return FinishedShard(
        tuple(WrittenTensor(**tensor) for tensor in entry["written"]),
        proof and ShardProof(proof["sha256"], tuple(Probe(**probe) for probe in proof["probes"])),
    )


def _stamp(path: Path) -> dict[str, int]:
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino}
