"""What a merge was asked for, and whether a directory already holds it."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from exporter.errors import InputRefused, UsageError
from exporter.files import LOCK
from exporter.manifest import file_is_unchanged, read_manifest
from exporter.merging.plan import MergePlan, Onto
from exporter.sources.adapter import CONFIG
from exporter.sources.hub import Source
from exporter.sources.own_files import own_roots
from exporter.sources.snapshot import TOKENIZER

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
        "base": {
            **_origin(base),
            "files": _stamps([*plan.base.files, base.directory / "config.json", *_small_files(base.directory)]),
        },
        "adapters": [
            {
                **_origin(source),
                "weight": weight,
                "files": _stamps([adapter.file, adapter.directory / CONFIG, *_small_files(source.directory)]),
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
    files = section.get("files")
    return bool(files) and all(file_is_unchanged(out / name, entry) for name, entry in files.items())


def refuse_inputs_as_output(out: Path, sources: Sequence[Source]) -> None:
    """UsageError, whatever --force says, if writing to `out` could replace or remove a file that the merge reads."""
    target = Path(os.path.realpath(out))
    for source in sources:
        for directory in own_roots(source.directory):
            if target == directory or directory in target.parents:
                raise UsageError(
                    f"{out} is {'' if target == directory else 'inside '}{directory}, which the merge reads",
                    expected="an output apart from the base and the adapters",
                    todo="choose another --out",
                )


def refuse_foreign_directory(out: Path, manifest: Mapping[str, Any] | None, force: bool) -> None:
    """UsageError if `out` holds what this command did not begin, and with `force` if it holds what must not be lost."""
    try:
        if not out.exists():
            return
    except OSError as error:
        raise UsageError(f"{out} cannot be a directory: {error.strerror}", todo="choose another --out") from error
    if not out.is_dir():
        raise UsageError(f"{out} is a file", expected="a directory", todo="choose another --out")
    if (out / CONFIG).exists():
        raise UsageError(
            f"{out} holds an adapter ({CONFIG})",
            expected="a directory without one: transformers would put it on top of the merged weights",
            todo="choose another --out, or move the adapter away",
        )
    if force:
        return
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


def _small_files(directory: Path) -> list[Path]:
    """What the output's tokenizer, template, generation config and model card may come from."""
    names = sorted(TOKENIZER | {"generation_config.json", "README.md"})
    return [directory / name for name in names if (directory / name).is_file()]


def _stamps(files: Sequence[Path]) -> dict[str, dict[str, int] | None]:
    """Size, time and inode of each file by its name; None where it is gone."""
    stamps: dict[str, dict[str, int] | None] = {}
    for path in files:
        try:
            status = path.stat()
        except OSError:
            stamps[path.name] = None
            continue
        stamps[path.name] = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino}
    return stamps


def readable_manifest(out: Path) -> dict[str, Any] | None:
    """The manifest of `out`; one that cannot be read is a foreign file like others."""
    with suppress(InputRefused, OSError):
        return read_manifest(out)
    return None
