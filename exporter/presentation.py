"""Results as text for people. `--json` prints the same facts in full."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from exporter.files import human_bytes

if TYPE_CHECKING:
    from exporter.diagnosis import Diagnosis
    from exporter.graph.bundle import Bundle
    from exporter.inspection import Inspection
    from exporter.manifest_check import ManifestCheck
    from exporter.merging.merge import MergedCheckpoint
    from exporter.merging.unmerge import UnmergedCheckpoint
    from exporter.parity.capture import Captured
    from exporter.parity.result import Verification
    from exporter.pipeline import RunResult
    from exporter.serving.serve import Ready


@dataclass(frozen=True, slots=True)
class Bundles:
    """What one `export` made."""

    bundles: "tuple[Bundle, ...]"

    def to_dict(self) -> dict[str, Any]:
        return {
            "bundles": [
                {"directory": str(b.directory), "precision": b.precision, "target": b.target, "graph": str(b.graph)}
                for b in self.bundles
            ]
        }


def inspection(found: "Inspection") -> str:
    lines = []
    if found.base is not None:
        lines.append(
            f"base      {found.base.source}  {_size(found.base.nbytes, found.base.tensors)}  {found.base.licence}"
        )
        for part in found.adapters:
            lines.append(f"adapter   {part.source}  {_size(part.nbytes, part.tensors)}  {part.licence}")
        lines.append(f"model     {found.architecture}, {found.parameters / 1e6:,.1f} M parameters")
        lines.append(f"changed   {len(found.changed)} tensors: {_group(found.changed)}")
        if found.vocab_size is not None:
            lines.append(f"vocab     {found.vocab_size} tokens, as in the adapter's embeddings")
        if found.untied:
            lines.append(f"untied    {', '.join(found.untied)}: the adapter changes one of two tied weights")
        lines.append(f"untouched {found.untouched} tensors, {len(found.dropped)} dropped")
        lines.append(
            f"output    {human_bytes(found.disk)} on disk in {found.shards} shard{'s' * (found.shards != 1)}, "
            f"at most {human_bytes(found.memory)} of memory for tensors, about {max(1, found.seconds):.0f} s here"
        )
        lines += [f"dropped   {name}: {reason}" for name, reason in list(found.dropped.items())[:4]]
    lines += [f"problem   {problem}" for problem in found.problems]
    return "\n".join(lines)


def _size(nbytes: int, tensors: int) -> str:
    return f"{human_bytes(nbytes)} in {tensors} tensors"


def _group(changed: tuple[Mapping[str, Any], ...]) -> str:
    kinds: dict[str, int] = {}
    for entry in changed:
        parts = [*entry["how"]]
        if entry["rank"]:
            scales = ", ".join(f"{scale:g}" for scale in entry["scale"])
            parts.append(f"r={', '.join(map(str, entry['rank']))}, scale {scales}, {entry['orientation']}")
        name = entry["name"].split(".")
        kind = f"{name[-2] if len(name) > 1 else name[0]} ({', '.join(parts)})"
        kinds[kind] = kinds.get(kind, 0) + 1
    return "; ".join(f"{count} x {kind}" if count > 1 else kind for kind, count in sorted(kinds.items()))


def merged(result: "MergedCheckpoint") -> str:
    if result.skipped:
        return f"{result.directory}: this merge is there and unchanged, nothing to do"
    tensors = result.section["tensors"]
    kept = {name: entry["kept"] for name, entry in tensors.items() if "kept" in entry}
    changed = len(result.plan.changed)
    proof = f"{len(tensors)} tensors read again and proven" if result.section["proof"] else "not proven (--proof none)"
    lines = [f"{result.directory}: {changed} of {len(tensors)} tensors changed, {proof}"]
    if kept:
        worst = min(kept, key=kept.__getitem__)
        lines.append(f"rounding kept {kept[worst]:.2%} of a delta or more, least in {worst}")
    swallowed = result.section["swallowed"]
    if swallowed:
        lines.append(f"WARNING: rounding swallowed more than half of the delta in {len(swallowed)} tensors")
    return "\n".join(lines)


def unmerged(result: "UnmergedCheckpoint") -> str:
    return (
        f"{result.directory}: {len(result.computed)} tensors restored by arithmetic, {len(result.from_base)} taken "
        "from the base, each with the digest that the merge noted"
    )


def bundles(made: Bundles) -> str:
    return "\n".join(f"{bundle.precision} for {bundle.target}: {bundle.graph}" for bundle in made.bundles)


def verification(result: "Verification") -> str:
    from exporter.report.figures import bundle_names

    lines = []
    for name, bundle in zip(bundle_names(result.bundles), result.bundles, strict=True):
        lines.append(f"{name}: {bundle.verdict}")
        for gate in bundle.gates:
            if gate.outcome in ("FAIL", "INCONCLUSIVE"):
                figure = "none" if gate.estimate is None else f"{gate.estimate:.3g}"
                limit = "" if gate.limit is None else f", limit {gate.limit:.3g}"
                lines.append(
                    f"  {gate.outcome} {gate.gate}: {gate.pair} {gate.statistic} {figure}{limit} {gate.detail}".rstrip()
                )
        killed = sum(mutant.outcome == "killed" for mutant in bundle.mutants)
        survived = [mutant.name for mutant in bundle.mutants if mutant.outcome == "survived"]
        lines.append(f"  {killed} mutants killed" + (f", SURVIVED: {', '.join(survived)}" if survived else ""))
    return "\n".join([*lines, result.verdict])


def captured(result: "Captured") -> str:
    return f"{result.path}: {result.documents} documents, {result.positions} positions, {human_bytes(result.nbytes)}"


def run(result: "RunResult") -> str:
    directory = result.directory
    lines = []
    if result.did_nothing:
        lines.append("nothing to do: every stage was done before, and its files are unchanged")
    lines += [f"{stage.name:22s} {'unchanged' if stage.skipped else 'done'}" for stage in result.stages]
    graphs = sorted({name for stage in result.stages for name in stage.files if name.endswith(".onnx")})
    listed = {name for stage in result.stages for name in stage.files if name.startswith("merged/")}
    count = sum(name.endswith(".safetensors") for name in listed)
    lines.append(f"merged weights         {directory / 'merged'} ({count} file{'s' if count != 1 else ''})")
    lines += [f"ONNX                   {directory / name}" for name in graphs]
    lines.append(f"report                 {directory / 'parity' / 'report.html'}")
    lines.append(result.verdict)
    return "\n".join(lines)


def ready(server: "Ready") -> str:
    models = [f"model     {model['id']} ({model['precision']}, {model['provider']})" for model in server.models]
    return "\n".join([*models, f"ready     {server.url}"])


def diagnosis(found: "Diagnosis") -> str:
    lines = []
    for check in found.checks:
        mark = "ok  " if check.ok else "LACK" if check.needed_by else "note"
        lines.append(f"{mark} {check.name}: {check.detail}")
        if not check.ok:
            needed = f"needed by {', '.join(check.needed_by)}. " if check.needed_by else ""
            lines.append(f"     {needed}{check.todo}")
    return "\n".join(lines)


def manifest_check(found: "ManifestCheck") -> str:
    lines = [f"missing   {name}" for name in found.missing]
    lines += [f"changed   {name}" for name in found.changed]
    lines += [f"unhashed  {name}: its stage noted no hash, its size is right" for name in found.unhashed]
    lines += [f"unlisted  {name}: no stage wrote it" for name in found.extra]
    lines.append(
        f"{found.files} files and {found.tensors} tensors, {human_bytes(found.nbytes)}, are as "
        f"{found.manifests} manifest{'s' * (found.manifests != 1)} list{'s' * (found.manifests == 1)} them"
    )
    if found.exit_code:
        lines.append("REFUSED: make what is missing or changed again")
    return "\n".join(lines)
