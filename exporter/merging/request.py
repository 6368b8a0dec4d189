"""What a merge was asked for, and whether a directory already holds it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from exporter.errors import InputRefused, UsageError
from exporter.files import LOCK
from exporter.manifest import file_is_unchanged
from exporter.merging.plan import MergePlan, Onto
from exporter.sources.adapter import CONFIG
from exporter.sources.hub import Source

STAGE = "merge"


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """weights: one per adapter. dtype: "auto" or a name. shard_size, memory: bytes. template: a name, a text or None.

    onto: the base's own weights, or what its bitsandbytes int8 codes mean. proof: "none" writes without digests.
    """

    weights: tuple[float, ...] = ()
    dtype: str = "auto"
    onto: Onto = "original"
    shard_size: int = 5_000_000_000
    memory: int = 1_000_000_000
    proof: Literal["full", "none"] = "full"
    template: str | None = None


def describe_request(
    base: Source, adapters: Sequence[Source], plan: MergePlan, options: MergeOptions
) -> dict[str, Any]:
    """Equal requests on unchanged inputs give equal outputs. The memory budget does not change a byte."""
    asked = {key: value for key, value in asdict(options).items() if key not in ("weights", "memory")}
    return {
        **asked,
        "base": {**_origin(base), "files": _stamps(base.directory, [*plan.base.files, base.directory / "config.json"])},
        "adapters": [
            {
                **_origin(source),
                "weight": weight,
                "files": _stamps(source.directory, [adapter.file, adapter.directory / CONFIG]),
            }
            for source, (adapter, weight) in zip(adapters, plan.adapters, strict=True)
        ],
    }


def refuse_changed_inputs(request: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """InputRefused if a file of the base or of an adapter is not the one that the plan was made from."""
    pairs = [(request["base"], now["base"]), *zip(request["adapters"], now["adapters"], strict=True)]
    for before, after in pairs:
        for name, entry in before["files"].items():
            if after["files"].get(name) != entry:
                raise InputRefused(
                    f"{name} of {before['source']} changed while it was read",
                    expected="files that stay as they are during a merge",
                    todo="run the same command again when nothing writes there",
                )


def is_done(out: Path, manifest: Mapping[str, Any], request: Mapping[str, Any]) -> bool:
    """True if `out` holds this very merge, proven if that is asked for, and every file of it is as it was written."""
    section = manifest["stages"].get(STAGE)
    if not section or section.get("request") not in (request, {**request, "proof": "full"}):
        return False
    return all(file_is_unchanged(out / name, entry) for name, entry in section["files"].items())


def refuse_foreign_directory(out: Path, manifest: Mapping[str, Any] | None, force: bool) -> None:
    """UsageError if `out` holds what this command did not begin."""
    if force or not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"{out} is a file", expected="a directory", todo="choose another --out")
    if manifest is None and (out / LOCK).exists():
        return  # a merge was killed here: what it left is not a finished checkpoint
    content = [p.name for p in out.iterdir() if p.name != LOCK and not p.name.endswith(".partial")]
    if content:
        what = "another merge or a damaged one" if manifest else f"something else ({sorted(content)[0]})"
        raise UsageError(
            f"{out} holds {what}",
            expected="an empty directory or this very merge",
            todo="choose another --out, or --force",
        )


def _origin(source: Source) -> dict[str, Any]:
    return {"source": source.id or str(source.directory), "revision": source.revision, "commit": source.commit}


def _stamps(directory: Path, files: Sequence[Path]) -> dict[str, dict[str, int] | None]:
    """Size, time and inode of each file by its name; None where it is gone."""
    stamps: dict[str, dict[str, int] | None] = {}
    for path in files:
        try:
            status = path.stat()
        except FileNotFoundError:
            stamps[path.name] = None
            continue
        stamps[path.name] = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino}
    return stamps
