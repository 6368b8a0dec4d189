"""A model's directory: one that exists, or a snapshot of a hub repository, pinned to a commit."""

import os
import re
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# Every failure of the transport is an OSError (requests, hub 0.x) or an HTTPError (httpx, hub 1.x and later).
from huggingface_hub.errors import HTTPError as TransportError  # pyright: ignore[reportPrivateImportUsage]
from huggingface_hub.utils import validate_repo_id  # pyright: ignore[reportPrivateImportUsage]
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from exporter.errors import EnvironmentLacking, ExporterError, InputRefused, UsageError
from exporter.files import human_bytes, nearest_existing
from exporter.progress import SILENT, Progress, Task
from exporter.sources.own_files import require_own_files
from exporter.sources.snapshot import ABOUT, COMMIT, Kind, cached_snapshot, choose_files, is_whole

HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[^@\s]+))?")
POLL_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model's files lie. The last three are None for a directory that the user named.

    directory: holds the config, the tokenizer and the weights (a hub snapshot holds symlinks: read it, never link it).
    id: "owner/name"; revision: what was asked for, such as "main"; commit: what that was, in 40 hexadecimal digits.
    """

    directory: Path
    id: str | None = None
    revision: str | None = None
    commit: str | None = None


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    size: int
    blob: str  # its name in the cache's blobs/: the SHA-256 of a large file, the git hash of a small one


def resolve(
    source: str | Path,
    *,
    revision: str | None = None,
    commit: str | None = None,
    kind: Literal["base", "adapter"],
    progress: Progress = SILENT,
) -> Source:
    """The directory of a base or an adapter: `source` itself if it exists, else the hub's `owner/name[@revision]`.

    commit: what the revision is to stand for, where an earlier call has found it; by default what it is at the hub now.
    A download goes into huggingface_hub's cache, resumes where an earlier one stopped, and takes no code: config,
    tokenizer, licence and weights, safetensors where there are some, else `.bin`. With HF_HUB_OFFLINE, or with a hub
    that cannot be reached, a complete snapshot in the cache serves. Raises InputRefused (no such directory or
    repository, no access to it, nothing usable in it), EnvironmentLacking (network, disk), UsageError.
    """
    path = os.path.expanduser(source)  # noqa: PTH111 (unlike Path's, it takes any text: no such user, too long, NUL)
    if path and os.path.exists(path):  # noqa: PTH110
        return _directory(Path(path), revision)
    if isinstance(source, Path) or _looks_like_a_path(source):
        raise InputRefused(
            f"no such directory: {source}", expected=f"the directory of the {kind}, or a hub id", todo="check the path"
        )
    name, own = _parse_id(source)
    if own and revision and own != revision:
        raise UsageError(f"{source} and the revision {revision} disagree", expected="one revision")
    asked = own or revision or constants.DEFAULT_REVISION
    return replace(_from_hub(name, commit or asked, kind, progress), revision=asked)


def _parse_id(source: str) -> tuple[str, str | None]:
    """`owner/name[@revision]` as its parts."""
    match = HUB_ID.fullmatch(source)
    try:
        validate_repo_id(match["id"] if match else "")
    except HFValidationError:
        match = None
    if match is None:
        raise InputRefused(
            f"{source[:200]!r} is neither a directory nor a hub id",
            expected="a directory, or owner/name[@revision]",
            todo="check the path or the id",
        )
    return match["id"], match["revision"]


def _directory(path: Path, revision: str | None) -> Source:
    if not path.is_dir():
        raise InputRefused(f"{path} is a file", expected="a directory with a config and weights")
    require_own_files(path)
    if revision is not None:
        raise UsageError(
            f"{path} is a directory, and it has no revision {revision}",
            expected="a revision together with a hub id only",
            todo="leave the revision out",
        )
    return Source(path)


def _looks_like_a_path(source: str) -> bool:
    name = source.partition("@")[0]  # a revision such as refs/pr/1 has slashes of its own
    return name.startswith((".", "/", "~")) or name.endswith("/") or "\\" in name or name.count("/") > 1


def _from_hub(id: str, revision: str, kind: Kind, progress: Progress) -> Source:
    cached = cached_snapshot(id, revision, kind)
    if cached and COMMIT.fullmatch(revision) and is_whole(cached):  # a commit never changes: nothing to ask the hub
        return Source(cached, id, revision, cached.name)
    if constants.HF_HUB_OFFLINE:
        if cached is None:
            raise EnvironmentLacking(
                f"{id}@{revision} is not in the hub cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set",
                todo=f"unset HF_HUB_OFFLINE, or name a directory that holds the {kind}",
            )
        return Source(cached, id, revision, cached.name)
    try:
        wanted, weights = _list_files(id, revision, kind)
        directory = _download(id, revision, wanted, weights, progress)
    except (OSError, TransportError, HFValidationError, RuntimeError) as error:
        refusal = _translate(error, id, revision)
        if cached is None or not isinstance(refusal, EnvironmentLacking):
            raise refusal from error
        progress.note(f"the hub cannot be reached: {id}@{revision} is taken from the cache, commit {cached.name}")
        return Source(cached, id, revision, cached.name)
    return Source(directory, id, revision, directory.name)


def _list_files(id: str, revision: str, kind: Kind) -> tuple[list[_File], list[_File]]:
    """The small files and the weights to download, with their sizes."""
    info = HfApi().model_info(id, revision=revision, files_metadata=True)
    files = {entry.rfilename: _file(entry) for entry in info.siblings or []}
    chosen = choose_files(list(files), kind, f"{id}@{revision}")
    return [files[name] for name in chosen.small], [files[name] for name in chosen.weights]


def _file(entry: Any) -> _File:
    if entry.lfs is not None:
        return _File(entry.rfilename, entry.lfs.size or 0, entry.lfs.sha256 or "")
    return _File(entry.rfilename, entry.size or 0, entry.blob_id or "")


def _download(id: str, revision: str, small: Sequence[_File], weights: Sequence[_File], progress: Progress) -> Path:
    """The snapshot's directory.

    Weights come after what a model needs beside them, so that a snapshot with all its weights can be used, and what
    `is_whole` goes by after the weights, so that a whole one lacks nothing.
    """
    cache = Path(constants.HF_HUB_CACHE)
    blobs = cache / f"models--{id.replace('/', '--')}" / "blobs"
    files = [*small, *weights]
    total = sum(file.size for file in files)
    missing = total - _bytes_there(blobs, files)
    if missing > (free := _free(cache)):
        raise EnvironmentLacking(
            f"the download of {id} needs {human_bytes(missing)} in {cache}, and {human_bytes(free)} are free",
            todo="free some space, or set HF_HOME to a directory on a larger disk",
        )
    with progress.task(f"download {id}", total, "B") as task, _watched(blobs, files, task):
        last = [file for file in small if ABOUT.fullmatch(file.name)]
        first = [file for file in small if file not in last]
        directory = Path()
        for part in filter(None, (first, weights, last)):
            names = [file.name for file in part]
            directory = Path(snapshot_download(id, revision=revision, allow_patterns=names))
            revision = directory.name
    return directory


def _bytes_there(blobs: Path, files: Sequence[_File]) -> int:
    """Bytes of `files` that the cache already holds, partial downloads among them."""
    there = 0
    for file in files:
        if not file.blob:
            continue
        complete = blobs / file.blob
        # Partial names: `<blob>.incomplete` (hub 0.x and 1.x), `<blob>.<random>.incomplete` (2.x).
        paths = [complete] if complete.exists() else list(blobs.glob(f"{file.blob}*.incomplete"))
        there += min(max((_size(path) for path in paths), default=0), file.size)
    return there


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # renamed since it was listed: the next look sees it under its final name
        return 0


@contextmanager
def _watched(blobs: Path, files: Sequence[_File], task: Task) -> Iterator[None]:
    """Report what arrives in `blobs`; huggingface_hub's own bars, which differ by version and transport, are off."""
    stop = threading.Event()

    def watch() -> None:
        seen = 0
        while True:
            last = stop.wait(POLL_SECONDS)
            now = _bytes_there(blobs, files)
            if now > seen:
                task.advance(now - seen)
                seen = now
            if last:
                return

    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    thread = threading.Thread(target=watch, name="download progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        if not were_disabled:
            enable_progress_bars()


def _translate(error: Exception, id: str, revision: str) -> ExporterError:
    """huggingface_hub's error as one of ours: wrong ids and missing rights are the input's, the rest is around us."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if isinstance(error, GatedRepoError) or status == 403:
        return InputRefused(
            f"the hub does not give you access to {id}",
            expected="a repository that is public, or that your account may read",
            todo=f"accept its terms on {constants.ENDPOINT}/{id}, then log in with `hf auth login` or set HF_TOKEN",
        )
    if isinstance(error, RevisionNotFoundError):
        return InputRefused(f"{id} has no revision {revision}", expected="a branch, a tag or a full commit hash")
    if isinstance(error, DisabledRepoError):
        return InputRefused(f"the hub has disabled {id}", expected="a repository that can be downloaded")
    if isinstance(error, RepositoryNotFoundError | HFValidationError) or status in (401, 404):
        return InputRefused(
            f"{id} is not on the hub ({constants.ENDPOINT}), or it is private",
            expected="an existing directory, or the id of a repository that you may read",
            todo="check the spelling; for a private repository log in with `hf auth login` or set HF_TOKEN",
        )
    cache = Path(constants.HF_HUB_CACHE)
    return EnvironmentLacking(
        f"{id}@{revision} could not be downloaded from {constants.ENDPOINT}: {root_cause(error)}",
        todo="check the network, HF_ENDPOINT and the space in the cache "
        f"({cache}, {human_bytes(_free(cache))} free), then repeat: the download resumes",
    )


def root_cause(error: BaseException) -> str:
    """One line on why a request failed: the operating system's reason where there is one below the wrappers."""
    reason, cause = error, error
    while cause := cause.__cause__ or cause.__context__:
        if isinstance(cause, OSError) and cause.strerror:
            reason = cause
    if isinstance(reason, OSError) and reason.strerror:
        return reason.strerror
    return next((line.strip() for line in str(reason).splitlines() if line.strip()), type(reason).__name__)


def _free(path: Path) -> int:
    return shutil.disk_usage(nearest_existing(path)).free
