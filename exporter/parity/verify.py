"""`exporter verify`: do the merged weights and the ONNX bundle still say what the unmerged 8-bit model said?"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import InputRefused, UsageError
from exporter.files import human_bytes, require_free_space, sha256_file, write_atomically
from exporter.manifest import versions
from exporter.parity.attention import attention_notes
from exporter.parity.bases import BaseOptions
from exporter.parity.blocks_choice import Fp32Model, Memory, score_fp32
from exporter.parity.blocks_specs import base_blocks, merged_blocks, truth_blocks
from exporter.parity.bundle_check import Run, verify_bundle
from exporter.parity.bundles import Bundle, open_bundles
from exporter.parity.companions import check_companions, find_template
from exporter.parity.documents import LEVELS, Level, tokens_sha256
from exporter.parity.finished import Finished
from exporter.parity.gates import load_thresholds
from exporter.parity.inputs import Pair, check_bundle_inputs, make_documents, open_pair, resolve_pair
from exporter.parity.int8_base import Onto
from exporter.parity.merge_bases import compare_merge_bases
from exporter.parity.models import (
    TorchScorer,
    TruthModels,
    base_scorer,
    load_reference,
    older_objects_set_aside,
    parameter_count,
    reference_environment,
    release,
)
from exporter.parity.oracle import Oracle
from exporter.parity.outliers import OUTLIERS, count_outlier_columns
from exporter.parity.pairs import common_pairs
from exporter.parity.reference import CapturedReference, LiveReference, Reference, check_capture, read_capture
from exporter.parity.result import SCHEMA_VERSION, BundleResult, Inputs, Verification, worst_verdict
from exporter.parity.scoring import LogitStore, Scorer
from exporter.parity.scratch import open_scratch
from exporter.parity.separate import find_adapter, with_adapters
from exporter.progress import SILENT, Progress
from exporter.sources.unchanged import require_unchanged, watch_all


def verify(
    *,
    base: str | Path,
    adapter: str | Path | Sequence[str | Path],
    bundle: str | Path | Sequence[str | Path],
    weight: Sequence[float] = (),
    prompts: str | Path | None = None,
    reference: str | Path = "int8",
    level: Level = "commit",
    scratch: str | Path | None = None,
    memory: Memory = "auto",
    progress: Progress = SILENT,
) -> Verification:
    """Compare bundles with the unmerged model in fp32 (the truth) and in 8 bits (the reference).

    For bundles that were merged onto int8 codes the truth is fp32 over what these codes mean, with the adapter.
    base, adapter: a directory or a hub id, one or several adapters with a weight each (default 1). bundle: directories.
    prompts: JSON lines, default the packaged set. reference: "int8" runs bitsandbytes here, else a file from `capture`.
    level: how much of the prompts is used. Nothing is written into a bundle.
    scratch: where logits and hidden states lie until the run is done, so that an interrupted one goes on; a temporary
    directory, and nothing to go on from, if it is None.
    memory: "auto" runs what does not fit into free memory block by block; "whole" and "blocks" leave no choice.
    Raises InputRefused (a file that is missing, malformed, changed or of another model), EnvironmentLacking (memory,
    disk, bitsandbytes). A difference is no error: see the result's verdict and exit_code.
    """
    started = time.monotonic()
    if level not in LEVELS:
        raise UsageError(f"level {level!r}", expected=" or ".join(LEVELS))
    directories = [Path(bundle)] if isinstance(bundle, str | Path) else [Path(one) for one in bundle]
    if not directories:
        raise UsageError("no bundle is given", expected="at least one directory with an ONNX graph")
    resolved, weighted = resolve_pair(base, adapter, weight, progress)
    watched = watch_all([resolved, *(source for source, _ in weighted), *directories])
    pair = open_pair(resolved, weighted, progress)
    opened = [one for directory in directories for one in open_bundles(directory, progress)]
    adapters = [find_adapter(one, pair) for one in opened]
    onto = _one_onto(opened)
    template, notes = find_template(opened, adapters, pair)
    documents, made = make_documents(pair, Path(prompts) if prompts else None, level, template)
    notes += made + attention_notes(pair.base.config)
    for one in opened:
        check_bundle_inputs(one, pair, documents)
        notes += check_companions(one, pair)
    tokens = tokens_sha256(documents)
    oracle = Oracle(pair.base, pair.weighted, onto)
    oracle.require_change()
    oracle.release()
    facts = _facts(pair, tokens, onto)
    with older_objects_set_aside(), open_scratch(Path(scratch) if scratch else None, facts) as directory:
        store = LogitStore(directory, documents, pair.vocabulary)
        _announce(store, str(reference), opened, progress)
        source = _score_references(pair, store, str(reference), tokens, progress, onto, memory)
        common = common_pairs(store, source, progress)
        run = Run(pair, oracle, documents, store, source, common, load_thresholds(), level, progress, memory)
        merge_bases = compare_merge_bases(pair, oracle, store, source, common.merge, level, memory, progress)
        finished = Finished(directory, {"level": level, "memory": memory, "reference": _reference_digest(reference)})
        results = tuple(_verified(run, one, finished) for one in with_adapters(opened, adapters, directory))
    require_unchanged(watched)
    return Verification(
        schema_version=SCHEMA_VERSION,
        verdict=worst_verdict([result.verdict for result in results]),
        summary=_summary(results),
        inputs=_inputs(run, tokens, time.monotonic() - started),
        environment=versions(),
        bundles=results,
        notes=tuple(notes),
        merge_bases=merge_bases,
    )


def _verified(run: Run, bundle: Bundle, finished: Finished) -> BundleResult:
    """What an interrupted run found of this bundle, else what is found now."""
    before = finished.read(bundle)
    if before is not None:
        run.progress.note(f"{bundle.graph}: verified before, unchanged")
        return before
    found = verify_bundle(run, bundle)
    finished.write(bundle, found)
    return found


def _reference_digest(reference: str | Path) -> str:
    """Of a captured file; the 8-bit model of this run is what the scratch directory is named by."""
    return "int8" if str(reference) == "int8" else sha256_file(Path(reference))


def _one_onto(bundles: Sequence[Bundle]) -> Onto:
    """The base that the bundles were merged onto: the truth is one model, so they must agree."""
    found = {bundle.onto: bundle for bundle in bundles}
    if len(found) > 1:
        names = ", ".join(f"{bundle.directory} onto {onto}" for onto, bundle in sorted(found.items()))
        raise InputRefused(
            f"the bundles were merged onto different bases: {names}",
            expected="bundles of one --onto: each has a truth of its own",
            todo="verify them in separate runs",
        )
    return bundles[0].onto


def _facts(pair: Pair, tokens: str, onto: Onto) -> dict[str, Any]:
    """All that the references' logits depend on: what another run left is used only where it is equal."""
    return {
        "tokens": tokens,
        "vocabulary": pair.vocabulary,
        "base": pair.base_files,
        "adapters": pair.adapter_files,
        "weights": [weight for _, weight in pair.weighted],
        "rows": pair.rows,
        "onto": onto,
        "environment": versions() | reference_environment(),
    }


def _announce(store: LogitStore, reference: str, bundles: Sequence[Bundle], progress: Progress) -> None:
    """EnvironmentLacking where the disk has no room for the logits of T, M32, B, R, and of one bundle's F, O and O1."""
    of_bundle = max(2 if one.format == "float" else 3 for one in bundles)
    needed = store.nbytes * (3 + (reference == "int8") + of_bundle)
    kept = sum(path.stat().st_size for path in store.directory.rglob("*") if path.is_file())
    require_free_space(store.directory, max(0, needed - kept), "the logits of all models")
    progress.note(f"up to {human_bytes(needed)} of logits in {store.directory}, removed when the run is done")


def _score_references(
    pair: Pair,
    store: LogitStore,
    reference: str,
    tokens: str,
    progress: Progress,
    onto: Onto = "original",
    memory: Memory = "auto",
) -> Reference:
    """T, B, M32 and R, one model in memory at a time. Onto int8, T is D: fp32 over what the base's int8 codes mean."""
    source: Reference
    if reference == "int8":
        outliers = store.directory / "R.outliers"
        if store.has("R") and outliers.is_file():
            progress.note("score R: done before")
        else:
            model = load_reference(pair.base, pair.weighted, pair.rows)  # first: it is what may be lacking
            write_atomically(outliers, count_outlier_columns(model, store.documents[0].tokens).encode())
            store.score("R", TorchScorer(model), progress)
            del model
            release()
        source = LiveReference(store, reference_environment() | {OUTLIERS: outliers.read_text()})
    else:
        captured = read_capture(Path(reference))
        check_capture(
            captured,
            tokens_sha256=tokens,
            base_files=pair.base_files,
            adapter_files=pair.adapter_files,
            weights=[weight for _, weight in pair.weighted],
            rows=store.rows,
            vocabulary=store.vocabulary,
        )
        source = CapturedReference(captured, store.documents)
    for one in _fp32_models(pair, BaseOptions(onto, pair.rows)):
        score_fp32(store, one, memory, progress)
    return source


def _fp32_models(pair: Pair, options: BaseOptions) -> Iterator[Fp32Model]:
    """T, M32 and B. Loaded whole, M32 is made of T, which is gone then."""
    nbytes = parameter_count(pair.base) * 4
    base, adapters = pair.base, pair.weighted
    loaded: list[TruthModels] = []

    def truth() -> Scorer:
        loaded.append(TruthModels(base, adapters, options))
        return loaded[0].truth()

    def merged() -> Scorer:
        return (loaded.pop() if loaded else TruthModels(base, adapters, options)).merged()

    yield Fp32Model("T", truth, lambda: truth_blocks(base, adapters, options), nbytes)
    yield Fp32Model("M32", merged, lambda: merged_blocks(base, adapters, options), nbytes)
    loaded.clear()
    yield Fp32Model("B", lambda: base_scorer(base, options), lambda: base_blocks(base, options), nbytes)


def _inputs(run: Run, tokens: str, seconds: float) -> Inputs:
    scopes = run.common.where.scope
    return Inputs(
        base=str(run.pair.base.directory),
        base_files=run.pair.base_files,
        adapters=tuple(f"{directory} x {weight:g}" for directory, weight in run.pair.weighted),
        adapter_files=run.pair.adapter_files,
        reference=run.reference.name,
        reference_environment=run.reference.environment,
        level=run.level,
        documents=len(run.documents),
        prompt_tokens=int(np.count_nonzero(scopes == "prompt")),
        response_tokens=int(np.count_nonzero(scopes == "response")),
        text_tokens=int(np.count_nonzero(scopes == "text")),
        truncated=sum(document.truncated for document in run.documents),
        tokens_sha256=tokens,
        thresholds_version=run.thresholds.version,
        seconds=round(seconds, 1),
        onto=run.oracle.onto,
    )


def _summary(results: Sequence[BundleResult]) -> str:
    """One line per bundle: its verdict, and the worst gate or the distance to the reference."""
    lines = []
    for result in results:
        name = f"{Path(result.directory).name} ({result.format}, {result.target})"
        faults = [gate for gate in result.gates if gate.outcome == "FAIL"] or [
            gate for gate in result.gates if gate.outcome == "INCONCLUSIVE"
        ]
        if faults:
            first = faults[0]
            figure = "" if first.estimate is None else f" = {first.estimate:.3g} (limit {first.limit:.3g})"
            lines.append(
                f"{result.verdict} {name}: {first.gate} {first.pair} {first.scope}{figure} {first.detail}".rstrip()
            )
        elif result.notes and result.verdict != "PASS":
            lines.append(f"{result.verdict} {name}: {result.notes[-1]}")
        else:
            reference = next(
                g for g in result.gates if g.pair == "R-O" and g.gate == "recorded" and g.statistic == "kl_mean"
            )
            killed = sum(mutant.outcome == "killed" for mutant in result.mutants)
            lines.append(
                f"{result.verdict} {name}: mean KL to the reference {reference.estimate:.3g}, {killed} mutants killed"
            )
    return "\n".join(lines)
