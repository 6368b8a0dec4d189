"""A hub on loopback: enough of the Hugging Face Hub's HTTP interface for huggingface_hub's clients to download from it.

It speaks `model_info`, the repository tree and `resolve` with ETag, X-Repo-Commit and ranges; large files redirect to a
second address, as LFS files do. Use it through the fixture `hub`, in this process or in a child started with `hub.env`.
"""

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

LOOPBACK = "127.0.0.1,localhost"
LARGE = (".safetensors", ".bin", ".h5")  # the file names that the hub keeps in LFS


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None


@dataclass
class Repository:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False


class Hub:
    """`url` while it runs; `requests` is its log; `cut_after` closes every large download after so many bytes."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.cut_after: int | None = None
        self.closed = False
        hub = self

        class Handler(_Handler):
            served = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        self.storage_url = f"http://localhost:{port}/lfs"  # another host, as the hub's storage is
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    @property
    def env(self) -> dict[str, str]:
        """The environment of a child process that must see this hub and an empty cache of its own."""
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(self.home), "HF_HUB_OFFLINE": "0", "NO_PROXY": LOOPBACK}
        inherited = ("HF_", "TRANSFORMERS_OFFLINE", "HUGGING")
        return {key: value for key, value in os.environ.items() if not key.startswith(inherited)} | own

    def publish(self, id: str, source: Path | Mapping[str, bytes], revision: str = "main") -> str:
        """Put a directory's files (or `name -> bytes`) into the repository `id`; returns the commit."""
        if isinstance(source, Path):
            paths = [path for path in sorted(source.rglob("*")) if path.is_file()]
            files = {path.relative_to(source).as_posix(): path.read_bytes() for path in paths}
        else:
            files = dict(source)
        digest = hashlib.sha1(id.encode())
        for name, data in sorted(files.items()):
            digest.update(name.encode() + hashlib.sha256(data).digest())
        commit = digest.hexdigest()
        repository = self.repositories.setdefault(id, Repository())
        repository.commits[commit] = files
        repository.refs[revision] = commit
        return commit

    def downloads(self) -> list[str]:
        """The names of the files whose bytes were asked for."""
        return [
            request.path.rpartition("/")[2]
            for request in self.requests
            if request.method == "GET" and ("/resolve/" in request.path or request.path.startswith("/lfs/"))
        ]

    def close(self) -> None:
        self.closed = True  # connections that are kept alive have threads of their own
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _etag(name: str, data: bytes) -> str:
    if name.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()  # git's blob id


def _file_entry(name: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"size": len(data), "blobId": _etag(name, data)}
    if name.endswith(LARGE):
        entry["lfs"] = {"sha256": _etag(name, data), "size": len(data), "pointerSize": 134}
    return entry


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        if self.served.closed:
            self.close_connection = True
            return
        path = urlsplit(self.path).path
        self.served.requests.append(Request(self.command, path, self.headers.get("Range")))
        parts = [unquote(part) for part in path.strip("/").split("/")]  # a revision's slashes come quoted
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            self._api("/".join(parts[2:4]), parts[4:])
        elif len(parts) >= 5 and parts[2] == "resolve":
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]), with_body)
        elif len(parts) >= 5 and parts[0] == "lfs":
            self._send_file(self._files("/".join(parts[1:3]), parts[3])[1], "/".join(parts[4:]), with_body)
        else:
            self._fail(404, "", "no such page")

    def _files(self, id: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repository = self.served.repositories[id]
        commit = repository.refs.get(revision, revision)
        return commit, repository.commits[commit]

    def _refused(self, id: str, revision: str, gated: bool = True) -> bool:
        repository = self.served.repositories.get(id)
        if repository is None:
            self._fail(404, "RepoNotFound", "Repository not found")
        elif repository.gated and gated:
            self._fail(401, "GatedRepo", f"Access to model {id} is restricted.")
        elif repository.refs.get(revision, revision) not in repository.commits:
            self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return False
        return True

    def _api(self, id: str, rest: list[str]) -> None:
        kind, revision = rest[:2] if len(rest) >= 2 else ("revision", "main")
        if self._refused(id, revision, gated=kind == "tree"):  # a gated repository still describes itself
            return
        commit, files = self._files(id, revision)
        if kind == "tree":
            tree = [{"type": "file", "path": name} | _entry_of_tree(name, data) for name, data in files.items()]
            self._send_json(tree)
        else:
            siblings = [{"rfilename": name} | _file_entry(name, data) for name, data in files.items()]
            self._send_json({"id": id, "modelId": id, "sha": commit, "siblings": siblings, "private": False})

    def _resolve(self, id: str, revision: str, name: str, with_body: bool) -> None:
        if self._refused(id, revision):
            return
        commit, files = self._files(id, revision)
        if name not in files:
            self._fail(404, "EntryNotFound", f"{name} does not exist")
            return
        if not name.endswith(LARGE):
            self._send_file(files, name, with_body, commit)
            return
        self.send_response(302)
        self.send_header("Location", f"{self.served.storage_url}/{id}/{commit}/{name}")
        self.send_header("X-Linked-Etag", f'"{_etag(name, files[name])}"')
        self.send_header("X-Linked-Size", str(len(files[name])))
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send_file(self, files: dict[str, bytes], name: str, with_body: bool, commit: str = "") -> None:
        data = files[name]
        first, last, status = 0, len(data) - 1, 200
        if asked := self.headers.get("Range"):
            begin, _, end = asked.removeprefix("bytes=").partition("-")
            first, last, status = int(begin), min(int(end), last) if end else last, 206
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{_etag(name, data)}"')
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        if not with_body:
            return
        body = data[first : last + 1]
        cut = self.served.cut_after
        if cut is not None and name.endswith(LARGE) and len(body) > cut:
            self.wfile.write(body[:cut])
            self.close_connection = True
        else:
            self.wfile.write(body)

    def _send_json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _fail(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _entry_of_tree(name: str, data: bytes) -> dict[str, Any]:
    entry = _file_entry(name, data)
    entry["oid"] = entry.pop("blobId")
    if "lfs" in entry:
        entry["lfs"]["oid"] = entry["lfs"].pop("sha256")
    return entry


def point_client_at(monkeypatch: pytest.MonkeyPatch, url: str, home: Path) -> None:
    """Make this process's huggingface_hub use `url` and an empty cache: it reads its environment once, at import."""
    from huggingface_hub import constants, file_download

    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    if hasattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE"):
        monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))  # no token of the user goes to a test
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, LOOPBACK)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty hub, and this process's huggingface_hub pointed at it."""
    server = Hub(tmp_path / "hf")
    point_client_at(monkeypatch, server.url, server.home)
    yield server
    server.close()
