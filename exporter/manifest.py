"""`exporter.json`: what each stage read, did and wrote. Only files that a stage lists count as its output."""

import hashlib
import json
import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

from exporter.errors import InputRefused, lacking
from exporter.files import sha256_file, write_atomically
from exporter.json_text import parse_json

MANIFEST = "exporter.json"
FORMAT = 1
PACKAGES = ("exporter", "torch", "transformers", "peft", "safetensors", "onnx-ir", "onnxruntime-gpu", "bitsandbytes")
HEAD = 1 << 16
LIMIT = 64 << 20  # a manifest takes some 300 bytes a tensor


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of `directory`, or None where there is none. Raises InputRefused when it is malformed."""
    path = directory / MANIFEST
    if not path.exists():
        return None
    try:
        if not path.is_file() or path.stat().st_size > LIMIT:
            raise ValueError(f"no file of at most {LIMIT} bytes")
        manifest = parse_json(path.read_bytes())
        if manifest["format"] != FORMAT or not isinstance(manifest["stages"], dict):
            raise ValueError(f"format {manifest['format']}")
        for name, section in manifest["stages"].items():
            if not isinstance(section, dict) or not _is_map_of_files(section.get("files", {})):
                raise ValueError(f"stage {name}")
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        if system := lacking(error):
            raise system from error
        raise InputRefused(
            f"{path} is not a manifest this version reads ({error})",
            expected=f'a JSON object with "format": {FORMAT} and "stages"',
            todo="make the directory again with this version",
        ) from error
    return manifest


def _is_map_of_files(value: object) -> bool:
    """True for entries under names that lead nowhere else: what is listed is opened and hashed."""
    return isinstance(value, dict) and all(
        isinstance(entry, dict) and _is_inside(name) and isinstance(entry.get("sha256"), str | None)
        for name, entry in value.items()
    )


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    plain = "\0" not in name and not path.is_absolute() and all(len(part.encode()) < 256 for part in path.parts)
    return plain and len(name) < 4096 and path.parts != () and ".." not in path.parts


def write_stage(directory: Path, stage: str, section: dict[str, Any]) -> None:
    """Put `section` under `stage` and replace the manifest, keeping the other stages."""
    manifest = read_manifest(directory) or {"format": FORMAT, "stages": {}}
    manifest["stages"][stage] = section
    write_atomically(directory / MANIFEST, manifest_bytes(manifest["stages"]))


def remove_stage(directory: Path, stage: str) -> None:
    """Replace the manifest by one without `stage`."""
    stages = (read_manifest(directory) or {"stages": {}})["stages"]
    write_atomically(directory / MANIFEST, manifest_bytes({name: one for name, one in stages.items() if name != stage}))


def manifest_bytes(stages: Mapping[str, Any]) -> bytes:
    return (json.dumps({"format": FORMAT, "stages": stages}, indent=1, sort_keys=True) + "\n").encode()


def stamp(path: Path) -> dict[str, Any]:
    """What changes when a file is replaced, without reading all of it: size, mtime_ns, inode, digest of the head.

    The head (64 kB) holds a safetensors header's first tensors, or a small file whole.
    """
    status = path.stat()
    with path.open("rb") as file:
        head = hashlib.sha256(file.read(HEAD)).hexdigest()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino, "head_sha256": head}


def describe_file(path: Path, sha256: str | None = None) -> dict[str, Any]:
    """A manifest's entry for a file; `sha256` where it is already known from writing it."""
    return {**stamp(path), "sha256": sha256 or sha256_file(path)}


def file_is_unchanged(path: Path, entry: dict[str, Any]) -> bool:
    """True if `path` is the file that `entry` describes: by its stamp, else by its hash where one was recorded."""
    if not path.is_file():
        return False
    now = stamp(path)
    if all(now[key] == entry.get(key) for key in now):
        return True
    if now["size"] != entry.get("size") or entry.get("sha256") is None:
        return False
    return sha256_file(path) == entry["sha256"]


@cache
def code_digest() -> str:
    """Of this package's own files: what another state of it found is found again."""
    files = sorted(path for path in Path(__file__).parent.rglob("*") if path.suffix in (".py", ".toml"))
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def versions() -> dict[str, str]:
    """The versions of what takes part, and the processor: what a digest may depend on."""
    return dict(_versions())


@cache
def _versions() -> Mapping[str, str]:
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
