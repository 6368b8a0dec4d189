"""`exporter run`: every stage in order, skipping what is already done and still true.

The output directory's own manifest records, for each stage, what it was asked (its request, with the digests of what
it read) and what it wrote. A stage is done while its request is the same and its files are as they were written. This
file imports no model library before a stage has work to do.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.errors import InputRefused, UsageError
from exporter.files import LOCK, lock_directory, removed_if_empty
from exporter.manifest import (
    MANIFEST,
    code_digest,
    describe_file,
    file_is_unchanged,
    read_manifest,
    remove_stage,
    stamp,
    versions,
    write_stage,
)
from exporter.progress import SILENT, Progress
from exporter.sources.unchanged import Stamp, require_unchanged, watch_all
from exporter.spec import Spec, read_spec, spec_of

if TYPE_CHECKING:
    from exporter.sources.hub import Source

NATIVE = "native"
PARITY_FILES = ("verification.json", "junit.xml", "summary.md", "report.html")


@dataclass(frozen=True, slots=True)
class StageOutcome:
    """skipped: the stage was already done. files: relative to the run's directory."""

    name: str
    skipped: bool
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunResult:
    """What `run` made. exit_code: 0, or the verdict's (1 failed, 3 not enough evidence)."""

    directory: Path
    stages: tuple[StageOutcome, ...]
    verdict: str
    exit_code: int

    @property
    def did_nothing(self) -> bool:
        return all(stage.skipped for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        stages = [asdict(stage) for stage in self.stages]
        return {
            "directory": str(self.directory),
            "stages": stages,
            "verdict": self.verdict,
            "exit_code": self.exit_code,
        }


def run(
    spec: str | Path | Spec | None = None,
    *,
    base: str | Path | None = None,
    adapter: str | Path | Sequence[str | Path] | None = None,
    out: str | Path | None = None,
    precision: Sequence[str] = (),
    target: Sequence[str] = (),
    template: str | None = None,
    level: str | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> RunResult:
    """Merge, export, verify and report, as `spec` (a TOML file) or the keywords say.

    Beside a spec, `out`, `precision`, `target`, `template` and `level` count in place of what it says; without one
    they are native, cpu, the adapter's or base's template, and commit.
    Raises what the first failing stage raises; a verdict that is not PASS is returned, with its exit code.
    """
    asked = _as_spec(spec, base, adapter, out)
    wanted = given(asked, out=out, precision=precision, target=target, template=template, level=level)
    directory = Path(wanted.output.dir)
    _refuse_foreign_directory(directory, force)
    with removed_if_empty(directory), lock_directory(directory):
        return _Run(wanted, directory, force, progress).stages()


def _as_spec(
    spec: str | Path | Spec | None,
    base: str | Path | None,
    adapter: str | Path | Sequence[str | Path] | None,
    out: str | Path | None,
) -> Spec:
    if spec is not None:
        if base is not None or adapter is not None:
            raise UsageError("both a spec and --base or --adapter", expected="one of the two")
        return spec if isinstance(spec, Spec) else read_spec(Path(spec))
    if base is None or adapter is None or out is None:
        raise UsageError("no spec", expected="a SPEC.toml, or --base, --adapter and --out")
    adapters = [adapter] if isinstance(adapter, str | Path) else list(adapter)
    return spec_of(
        {
            "base": {"source": str(base)},
            "adapter": [{"source": str(one)} for one in adapters],
            "output": {"dir": str(out)},
        }
    )


def given(
    spec: Spec,
    *,
    out: str | Path | None = None,
    precision: Sequence[str] = (),
    target: Sequence[str] = (),
    template: str | None = None,
    level: str | None = None,
) -> Spec:
    """The spec with what is given in place of what it says. UsageError for a value that a spec cannot have."""
    tables: dict[str, dict[str, Any]] = {
        "output": {"dir": None if out is None else str(out)},
        "export": {"precisions": tuple(precision), "targets": tuple(target)},
        "prompt": {"template": template},
        "verify": {"level": level},
    }
    table = spec.model_dump()
    for name, values in tables.items():
        table[name] |= {key: value for key, value in values.items() if value}
    return spec_of(table)


def _refuse_foreign_directory(directory: Path, force: bool) -> None:
    if force or not directory.exists():
        return
    if not directory.is_dir():
        raise UsageError(f"{directory} is a file", expected="a directory", todo="choose another --out")
    if (directory / "config.json").exists():
        raise UsageError(
            f"{directory} is a model's own directory",
            expected="a directory for all that a run makes",
            todo="choose another --out",
        )
    if read_manifest(directory) is None and not _is_begun(directory):
        raise UsageError(
            f"{directory} holds something else",
            expected="an empty directory or the output of an earlier run",
            todo="choose another --out, or --force",
        )


def _is_begun(directory: Path) -> bool:
    """True if nothing stands in `directory` but what a run leaves that was killed before its first stage was noted.

    That is a merge, finished or not: until it is finished some of it has partial names. A lock file alone is no leave
    to overwrite, since a native export that was killed leaves one in the user's own model directory, nor is a manifest
    that lists no merge: one that was not killed leaves that.
    """
    content = {path.name for path in directory.iterdir() if not _is_passing(path.name)}
    if content != {"merged"} or not (directory / "merged").is_dir():
        return not content
    merged = {path.name for path in (directory / "merged").iterdir()}
    stages = (read_manifest(directory / "merged") or {"stages": {}})["stages"]
    return "merge" in stages or all(map(_is_passing, merged)) or any(name.endswith(".partial") for name in merged)


def _is_passing(name: str) -> bool:
    return name == LOCK or (name.startswith(".") and name.endswith(".partial"))


class _Run:
    """One run over `directory`: the manifest is read before each stage and written after it."""

    def __init__(self, spec: Spec, directory: Path, force: bool, progress: Progress) -> None:
        self.spec, self.directory, self.force, self.progress = spec, directory, force, progress
        self.merged = directory / "merged"
        self.verdict: dict[str, Any] = {}
        self.watched: dict[Path, Stamp | None] = {}

    def stages(self) -> RunResult:
        base, adapters = self._sources()
        self.watched = watch_all([base.directory, *(source.directory for source in adapters)])
        outcomes = [self._merge(base, adapters)]
        self._drop_outdated()
        bundles = []
        for precision in self.spec.export.precisions:
            for target in sorted(self.spec.export.targets):  # cpu first: it decides on the files that both list
                bundles.append(bundle_directory(self.directory, precision, target))
                outcomes.append(self._export(precision, target))
        outcomes.append(self._verify(base, adapters, bundles))
        section = (read_manifest(self.directory) or {"stages": {}})["stages"]["verify"]
        if all(outcome.skipped for outcome in outcomes):
            self.progress.note(f"{self.directory}: nothing to do, every stage is done and its files are unchanged")
        return RunResult(self.directory, tuple(outcomes), section["verdict"], section["exit_code"])

    def _sources(self) -> "tuple[Source, list[Source]]":
        """Hub ids stay at the commit that an earlier run of the same spec resolved."""
        from exporter.sources.hub import resolve

        known = self._section("sources").get("commits", {})
        commits: dict[str, str] = {}

        def at_commit(source: str, revision: str | None, kind: Any) -> "Source":
            key = f"{source}@{revision or 'main'}"
            found = resolve(source, revision=revision, commit=known.get(key), kind=kind, progress=self.progress)
            if found.commit:
                commits[key] = found.commit
            return found

        base = at_commit(self.spec.base.source, self.spec.base.revision, "base")
        adapters = [at_commit(one.source, one.revision, "adapter") for one in self.spec.adapter]
        if commits != known:
            write_stage(self.directory, "sources", {"commits": commits})
        return base, adapters

    def _merge(self, base: "Source", adapters: "Sequence[Source]") -> StageOutcome:
        spec = self.spec.merge
        request = {
            "base": _stamps(base.directory),
            "adapters": [_stamps(source.directory) for source in adapters],
            "weights": [one.weight for one in self.spec.adapter],
            "dtype": spec.dtype,
            "onto": spec.onto,
            "shard_size": spec.shard_size,
            "template": self.spec.prompt.template,
        }

        def work() -> Mapping[str, Any]:
            from exporter.merging.merge import merge_sources
            from exporter.merging.request import MergeOptions

            self._refuse_without_builder(base)
            options = MergeOptions(
                weights=tuple(one.weight for one in self.spec.adapter),
                dtype=spec.dtype,
                onto=spec.onto,
                shard_size=spec.shard_size,
                memory=spec.memory,
                template=self.spec.prompt.template,
            )
            # Until this run has noted one, another merge that stands there is somebody's; an interrupted one goes on.
            force = self.force or bool(self._section("merge"))
            merged = merge_sources(base, adapters, self.merged, options, force=force, progress=self.progress)
            return {f"merged/{name}": entry for name, entry in merged.section["files"].items()}

        return self._stage("merge", request, work)

    def _refuse_without_builder(self, base: "Source") -> None:
        """InputRefused, before a merge that may take hours, for what the exports behind it would refuse."""
        from exporter.graph.architectures import SUPPORTED, find_architecture, read_decoder
        from exporter.sources.checkpoint import read_json

        config = read_json(base.directory / "config.json")
        if find_architecture(config) is None:
            raise InputRefused(
                f"no native builder for model_type {config.get('model_type')!r}, and run exports with no other",
                expected=SUPPORTED,
                todo=f"run three commands instead: exporter merge --out {self.merged}, exporter export "
                f"{self.merged} --builder optimum, exporter verify --bundle {self.directory / 'optimum'}",
            )
        read_decoder(config)

    def _drop_outdated(self) -> None:
        """Take what earlier runs exported of other weights, and this one does not, out of the manifest."""
        merged = _weights(self._digests("merge"))
        for name, section in (read_manifest(self.directory) or {"stages": {}})["stages"].items():
            if not name.startswith("export-") or name in self._stages_before_verify():
                continue
            request = section.get("request")
            made_of = request.get("merged") if isinstance(request, dict) else None
            if not isinstance(made_of, dict) or _weights(made_of) != merged:
                remove_stage(self.directory, name)
                precision, _, target = name.removeprefix("export-").rpartition("-")
                self.progress.note(
                    f"{bundle_directory(self.directory, precision, target)}: {name} of an earlier run is of other "
                    f"weights, and left out; --precision {precision} --target {target} makes it again"
                )

    def _export(self, precision: str, target: str) -> StageOutcome:
        block_size = self.spec.export.block_size
        request = {"precision": precision, "target": target, "merged": self._digests("merge")}
        if precision in ("int8", "int4"):
            request["block_size"] = block_size
        directory = bundle_directory(self.directory, precision, target)

        def work() -> Mapping[str, Any]:
            from exporter.graph.export import export

            bundle = export(
                self.merged,
                precision=[precision],
                target=[target],
                block_size=block_size,
                out=self.directory,
                force=True,
                progress=self.progress,
            )[0]
            return {f"{directory.name}/{name}": entry for name, entry in bundle.section["files"].items()}

        return self._stage(f"export-{precision}-{target}", request, work)

    def _verify(self, base: "Source", adapters: "Sequence[Source]", bundles: Sequence[Path]) -> StageOutcome:
        spec = self.spec.verify
        prompts = Path(spec.prompts) if spec.prompts else None
        reference = spec.reference if spec.reference == "int8" else Path(spec.reference)
        files = [path for path in (prompts, reference) if isinstance(path, Path) and path.is_file()]
        request = {
            "level": spec.level,
            "reference": spec.reference,
            "prompts": spec.prompts,
            "files": [describe_file(path)["sha256"] for path in files],
            "stages": {name: self._digests(name) for name in self._stages_before_verify()},
            "environment": versions(),  # a verdict is about what computed it too
            "code": code_digest(),
        }
        if "cuda" in self.spec.export.targets:
            from exporter.runtime.session import cuda_is_usable

            request["cuda"] = cuda_is_usable()  # without it these graphs are not run: no reason not to run them later

        def work() -> Mapping[str, Any]:
            from exporter.verification import verify

            verification = verify(
                base=base.directory,
                adapter=[source.directory for source in adapters],
                weight=[one.weight for one in self.spec.adapter],
                bundle=list(dict.fromkeys(bundles)),
                prompts=prompts,
                reference=spec.reference,
                level=spec.level,
                report=self.directory / "parity",
                progress=self.progress,
            )
            self.verdict = {"verdict": verification.verdict, "exit_code": verification.exit_code}
            return {f"parity/{name}": describe_file(self.directory / "parity" / name) for name in PARITY_FILES}

        return self._stage("verify", request, work)

    def _stage(self, name: str, request: Mapping[str, Any], work: Callable[[], Mapping[str, Any]]) -> StageOutcome:
        """InputRefused where an input changed since the run began: the merge of one base says nothing of another."""
        require_unchanged(self.watched)
        done = self._section(name)
        if not self.force and done.get("request") == request and self._unchanged(done):
            self.progress.note(f"{name}: done before, unchanged")
            return StageOutcome(name, True, tuple(done["files"]))
        self._say_what_is_made_again(name, done)
        files = work()
        require_unchanged(self.watched)
        extra = self.verdict if name == "verify" else {}
        write_stage(self.directory, name, {"request": dict(request), "files": dict(files), **extra})
        return StageOutcome(name, False, tuple(files))

    def _say_what_is_made_again(self, name: str, done: Mapping[str, Any]) -> None:
        """Files of an earlier run that somebody has changed since are written over: never without a word."""
        files = {file: entry for file, entry in done.get("files", {}).items() if (self.directory / file).is_file()}
        changed = [file for file, entry in files.items() if not file_is_unchanged(self.directory / file, entry)]
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            self.progress.note(f"{name}: {changed[0]}{more} changed since the run that wrote it, and is made again")

    def _section(self, name: str) -> dict[str, Any]:
        return (read_manifest(self.directory) or {"stages": {}})["stages"].get(name, {})

    def _unchanged(self, section: Mapping[str, Any]) -> bool:
        return all(file_is_unchanged(self.directory / name, entry) for name, entry in section["files"].items())

    def _stages_before_verify(self) -> list[str]:
        exports = [f"export-{p}-{t}" for p in self.spec.export.precisions for t in self.spec.export.targets]
        return ["merge", *exports]

    def _digests(self, stage: str) -> dict[str, str]:
        """What a stage wrote, by content: a stage that reads it is redone when, and only when, a byte differs."""
        return {name: entry["sha256"] for name, entry in self._section(stage).get("files", {}).items()}


def bundle_directory(directory: Path, precision: str, target: str) -> Path:
    """merged/ serves both targets in native precision; other precisions have a directory for each target."""
    if precision == NATIVE:
        return directory / "merged"
    return directory / (precision if target == "cpu" else f"{precision}-{target}")


def _weights(digests: Mapping[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in digests.items() if name.endswith(".safetensors")}


def _stamps(directory: Path) -> dict[str, Any]:
    """Every file of a source by its stamp: a replaced file changes it, and no weight is read."""
    files = sorted(path for path in directory.iterdir() if path.is_file() and path.name not in (MANIFEST, LOCK))
    return {path.name: {key: value for key, value in stamp(path).items() if key != "inode"} for path in files}
