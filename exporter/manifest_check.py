"""`exporter verify-manifest`: every byte that a manifest lists, read and hashed again."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from exporter.errors import EnvironmentLacking, InputRefused
from exporter.files import BLOCK, LOCK
from exporter.manifest import MANIFEST, read_manifest
from exporter.progress import SILENT, Progress, Task
from exporter.sources.own_files import require_own_files
from exporter.sources.safetensors_file import read_header
from exporter.sources.tensors import TensorInfo

SAFETENSORS = ".safetensors"


@dataclass(frozen=True, slots=True)
class ManifestCheck:
    """What was found beneath `directory`; names are relative to it.

    files, tensors, nbytes: how many were hashed and found equal. changed, missing: files, or `file: tensor`.
    unhashed: files whose stage noted no hash (`--proof none`); only their size was compared. extra: files that no
    stage lists, which is no fault. exit_code: 0, or 4 where something is changed or missing.
    """

    directory: Path
    manifests: int
    files: int
    tensors: int
    nbytes: int
    changed: tuple[str, ...]
    missing: tuple[str, ...]
    unhashed: tuple[str, ...]
    extra: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        return InputRefused.exit_code if self.changed or self.missing else 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"directory": str(self.directory), "exit_code": self.exit_code}


@dataclass(frozen=True, slots=True)
class _Listed:
    """One file and everything that manifests say of it. tensors: SHA-256 by name."""

    path: Path
    entries: tuple[Mapping[str, Any], ...]
    tensors: Mapping[str, str]


def verify_manifest(directory: str | Path, *, progress: Progress = SILENT) -> ManifestCheck:
    """Hash all that the manifest of `directory` lists, and of the directories in it, and compare.

    `directory`: a merged checkpoint, a bundle, or `artifacts/<name>` with all beneath. Differences are returned, see
    `exit_code`. Raises InputRefused (no manifest, one that lists files elsewhere), EnvironmentLacking (a read error).
    """
    root = Path(directory)
    if not root.is_dir():
        raise InputRefused(f"{root} is not a directory", expected=f"a directory with {MANIFEST}", todo="check the path")
    places = [root, *sorted(child for child in root.iterdir() if child.is_dir() and not child.is_symlink())]
    manifests = {}
    for place in places:
        require_own_files(place)
        if (manifest := read_manifest(place)) is not None:
            manifests[place] = manifest
    if not manifests:
        raise InputRefused(
            f"{root} holds no {MANIFEST}",
            expected="a directory that exporter merge, export or run wrote",
            todo="check the path; files that no manifest lists have no digest to compare with",
        )
    listed = _listed(manifests)
    return _check(root, len(manifests), listed, _extra(root, manifests, listed), progress)


def _check(
    root: Path, manifests: int, listed: Sequence[_Listed], extra: tuple[str, ...], progress: Progress
) -> ManifestCheck:
    changed, missing, unhashed = [], [], []
    files = tensors = nbytes = 0
    present = [one for one in listed if one.path.is_file()]
    missing += [_name(root, one.path) for one in listed if one not in present]
    with progress.task(f"hash {root.name}", sum(one.path.stat().st_size for one in present), "B") as task:
        for one in present:
            name, faults = _name(root, one.path), []
            infos = _infos(one)
            sha256, found = _hash(one.path, infos or [], task)
            size = one.path.stat().st_size
            expected = [entry["sha256"] for entry in one.entries if entry.get("sha256") is not None]
            equal = all(digest == sha256 for digest in expected)
            if infos is None or not equal or any(entry.get("size") != size for entry in one.entries):
                faults.append(name)
            for tensor, digest in one.tensors.items():
                if found.get(tensor) != digest:
                    (faults if tensor in found else missing).append(f"{name}: {tensor}")
            if not expected:
                unhashed.append(name)
            elif name not in faults:
                files, nbytes = files + 1, nbytes + size
            tensors += sum(found.get(tensor) == digest for tensor, digest in one.tensors.items())
            changed += faults
    return ManifestCheck(
        root, manifests, files, tensors, nbytes, tuple(changed), tuple(missing), tuple(unhashed), extra
    )


def _name(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def _listed(manifests: Mapping[Path, Mapping[str, Any]]) -> list[_Listed]:
    """Files of all stages, each once. InputRefused for a name that leads elsewhere."""
    entries: dict[Path, list[Mapping[str, Any]]] = {}
    tensors: dict[Path, dict[str, str]] = {}
    for place, manifest in manifests.items():
        for section in manifest["stages"].values():
            files = section.get("files", {})
            for name, entry in files.items():
                _require_inside(place, name)
                entries.setdefault(place / name, []).append(entry)
            weights = {place / name: _names(place / name) for name in files if name.endswith(SAFETENSORS)}
            for name, digest in _tensor_digests(place, section):
                holders = [path for path, names in weights.items() if name in names] or list(weights)
                if holders:  # where none holds it, the first is said to lack it
                    tensors.setdefault(holders[0], {})[name] = digest
    return [_Listed(path, tuple(entries[path]), tensors.get(path, {})) for path in sorted(entries)]


def _require_inside(place: Path, name: str) -> None:
    real = os.path.realpath(place)
    plain = (
        name and not PurePosixPath(name).is_absolute() and "\0" not in name and ".." not in PurePosixPath(name).parts
    )
    if not plain or not Path(os.path.realpath(place / name)).is_relative_to(real):
        raise InputRefused(
            f"{place / MANIFEST} lists {name[:120]!r}", expected="files inside the directory", todo="make it again"
        )


def _tensor_digests(place: Path, section: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """A merge notes {"sha256": ...} for each tensor, an export the digest itself."""
    listed = section.get("tensors", {})
    if not isinstance(listed, dict):
        raise InputRefused(f"{place / MANIFEST} has tensors that are a {type(listed).__name__}", expected="a map")
    for name, entry in listed.items():
        digest = entry.get("sha256") if isinstance(entry, dict) else entry
        if isinstance(digest, str):
            yield name, digest


def _names(path: Path) -> frozenset[str]:
    try:
        return frozenset(read_header(path)[0]) if path.is_file() else frozenset()
    except InputRefused:  # it is malformed, and is named for that when it is hashed
        return frozenset()


def _infos(one: _Listed) -> list[TensorInfo] | None:
    """The file's tensors in the order of their bytes, where digests of tensors are known; None if it is malformed."""
    if not one.tensors:
        return []
    try:
        return sorted(read_header(one.path)[0].values(), key=lambda info: info.offset)
    except InputRefused:
        return None


def _hash(path: Path, infos: Sequence[TensorInfo], task: Task) -> tuple[str, dict[str, str]]:
    """SHA-256 of the file and of each tensor, in one reading."""
    whole, found = hashlib.sha256(), {}
    try:
        with path.open("rb", buffering=0) as file:
            _feed(file, infos[0].offset if infos else path.stat().st_size, [whole], task)
            for info in infos:
                own = hashlib.sha256()
                _feed(file, info.nbytes, [whole, own], task)
                found[info.name] = own.hexdigest()
    except OSError as error:
        raise EnvironmentLacking(
            f"{path} cannot be read: {error.strerror}", todo="check its permissions and the disk"
        ) from error
    return whole.hexdigest(), found


def _feed(file: Any, count: int, digests: Sequence[Any], task: Task) -> None:
    while count and (block := file.read(min(BLOCK, count))):
        for digest in digests:
            digest.update(block)
        count -= len(block)
        task.advance(len(block))


def _extra(root: Path, manifests: Mapping[Path, object], listed: Sequence[_Listed]) -> tuple[str, ...]:
    known = {one.path for one in listed} | {place / MANIFEST for place in manifests}
    found = {path for place in manifests for path in place.iterdir() if path.is_file() or path.is_symlink()}
    return tuple(_name(root, path) for path in sorted(found - known) if path.name != LOCK)
