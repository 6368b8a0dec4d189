"""Everything that is checked of one bundle: weights, logits, cache and padding, mutants."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from exporter.errors import InputRefused
from exporter.graph.bundle import Bundle as GraphBundle
from exporter.graph.genai_config import stop_tokens
from exporter.parity import feeding, filled_context
from exporter.parity.bases import BaseOptions
from exporter.parity.blocks_choice import Fp32Model, GraphPlace, Memory, open_scorer, score_fp32
from exporter.parity.blocks_specs import carried_blocks, truth_blocks
from exporter.parity.bundles import Bundle
from exporter.parity.documents import Document, Level
from exporter.parity.evidence import apart, counted, distinct
from exporter.parity.gates import Gate, Thresholds, finiteness, judge, verdict
from exporter.parity.graph_mutants import GraphSubject, graph_mutants
from exporter.parity.graphs import full_precision
from exporter.parity.inputs import Pair, context
from exporter.parity.layer_check import layer_errors
from exporter.parity.merge_mutants import merge_mutants
from exporter.parity.models import load_weights, release
from exporter.parity.oracle import Oracle
from exporter.parity.origin import find_origin
from exporter.parity.pairs import (
    BundlePairs,
    CommonPairs,
    bundle_pairs,
    by_position,
    histogram,
    recorded,
    worst_tokens,
)
from exporter.parity.reference import LiveReference, Reference
from exporter.parity.result import BundleResult, CacheCheck, GateResult, Layer, Verdict, worst_verdict
from exporter.parity.scoring import LogitStore
from exporter.parity.statistics import PairTokens
from exporter.parity.weights import check_weights
from exporter.progress import Progress
from exporter.runtime.copying_runner import CopyingRunner, require_known_interface
from exporter.runtime.runner import Runner
from exporter.runtime.session import open_session
from exporter.sources.checkpoint import read_json

SHORT = 48  # tokens of the document that graph mutants run on
WHOLE_CONTEXT_AT_COMMIT = 1024  # a longer context is only filled at the other levels


@dataclass(frozen=True, slots=True)
class Run:
    """What every bundle of one run shares."""

    pair: Pair
    oracle: Oracle
    documents: Sequence[Document]
    store: LogitStore
    reference: Reference
    common: CommonPairs
    thresholds: Thresholds
    level: Level
    progress: Progress
    memory: Memory = "auto"


def verify_bundle(run: Run, bundle: Bundle) -> BundleResult:
    gates = [gate for gate in run.thresholds.gates if bundle.format in gate.formats and bundle.target in gate.targets]
    if not gates:
        raise InputRefused(
            f"{bundle.graph} is {bundle.format} for {bundle.target}", expected="a format that thresholds.toml judges"
        )
    weights = check_weights(bundle, run.oracle, run.thresholds.projection, run.progress)
    mutants = merge_mutants(bundle, run.oracle, run.thresholds.projection, run.progress)
    run.oracle.release()
    cache = _score_bundle(run, bundle)
    pairs = bundle_pairs(run.store, run.reference, run.common, bundle.format != "float", run.progress)
    mutants += graph_mutants(_subject(run, bundle), gates)
    filled, notes = _filled_context(run, bundle, gates)
    results = [*weights.gates, *_logit_gates(run, gates, pairs), *_feeding_gates(gates, cache), *filled]
    results += [figure for name in ("T-O", "R-O", "T-R", "F-O") for figure in recorded(pairs.comparisons[name])]
    results += cache.recorded
    _drop_bundle(run)
    layers, no_layers = _layers(run, bundle)
    origin = find_origin(
        bundle.format, results, weights.faults, weights.projections, pairs.stages, layers, run.oracle.state_names
    )
    survivors = [mutant.name for mutant in mutants if mutant.outcome == "survived"]
    correctness, quality = verdict(results, "correctness"), None
    if any(result.kind == "quality" for result in results):
        quality = verdict(results, "quality")
    if bundle.provenance == "unknown":
        notes.append("provenance unknown: no manifest lists these files; they were compared by content")
    notes += [f"{name}: no CUDA provider is here to run it; this verdict is not about it" for name in bundle.others]
    notes += [no_layers] if no_layers else []
    if _place(run, bundle).is_ranged(bundle.model()):
        notes.append("the graph ran as ranges of its nodes: no batch of unequal rows was decoded, no cache was read")
    if survivors:
        notes.append(f"the run is invalid: {len(survivors)} mutant(s) survived ({', '.join(survivors)})")
    whole = worst_verdict([correctness, *([quality] if quality else []), *_invalid(survivors)])
    return BundleResult(
        directory=str(bundle.directory),
        format=bundle.format,
        target=bundle.target,
        provenance=bundle.provenance,
        files=bundle.hashes,
        verdict=whole,
        correctness=correctness,
        quality=quality,
        gates=tuple(results),
        projections=tuple(weights.projections),
        stages=pairs.stages,
        mutants=tuple(mutants),
        cache=tuple(_summaries(cache)),
        histograms=tuple(histogram(pairs.comparisons[name]) for name in ("T-O", "R-O", "F-O", "T-R")),
        by_position=by_position(pairs.comparisons["T-O"], run.common.where),
        worst=worst_tokens(pairs, run.common.where, run.documents, run.pair.tokenizer),
        notes=tuple(notes),
        layers=layers,
        origin=origin,
    )


def _layers(run: Run, bundle: Bundle) -> tuple[tuple[Layer, ...], str]:
    options = BaseOptions(run.oracle.onto, run.pair.rows)
    return layer_errors(
        lambda: truth_blocks(run.pair.base, run.pair.weighted, options),
        lambda: carried_blocks(bundle.directory, bundle.weights),
        bundle,
        run.documents,
        run.level,
        run.progress,
    )


@dataclass(frozen=True, slots=True)
class Fed:
    """The cache checks and the padding checks of one bundle. recorded: of the cache itself, where it could be read."""

    cache: list[tuple[str, PairTokens]]
    padding: list[tuple[str, PairTokens]]
    recorded: list[GateResult]


def _score_bundle(run: Run, bundle: Bundle) -> Fed:
    """F, O and, for a quantized bundle, O1 into the store; the ways of feeding on the side."""
    content = bundle.content
    score_fp32(run.store, _carried(bundle), run.memory, run.progress)
    rows = [document.tokens for document in sorted(run.documents, key=lambda d: -len(d.tokens))[:3]]
    rows = [row[: feeding.LONGEST - 7 * i] for i, row in enumerate(rows)]  # unequal lengths on purpose
    graph, place, figures = bundle.model(), _place(run, bundle), list[GateResult]()
    length = context(read_json(bundle.directory / "config.json"))
    whole = _fills_context(run, length)
    if place.is_ranged(graph):
        place.score(run.store, "O", graph, content)
        cache = feeding.check_cache_in_graph(place.open(graph), rows, length, whole)
    else:
        runner = _runner(bundle)
        if not run.store.has("O", content):
            run.store.score("O", runner, run.progress, content)
        cache = feeding.check_cache(runner, rows, whole)
        figures.append(feeding.cache_error(runner, rows))
        del runner
    padding = feeding.check_padding(place.open(graph), rows, bundle.target)
    if bundle.format != "float":
        place.score(run.store, "O1", full_precision(graph), content)
    release()
    return Fed(cache, padding, figures)


def _fills_context(run: Run, length: int) -> bool:
    return run.level != "commit" or length <= WHOLE_CONTEXT_AT_COMMIT


def _filled_context(run: Run, bundle: Bundle, gates: Sequence[Gate]) -> tuple[list[GateResult], list[str]]:
    """The gates of a full context, and what has to be said of it."""
    config = read_json(bundle.directory / "config.json")
    length, judging = context(config), [gate for gate in gates if gate.pair == filled_context.NAME]
    if not judging or not _fills_context(run, length):
        return [], []
    filled = filled_context.filled_length(length, int(config["vocab_size"]))
    said = f"positions from {filled} on, of {length}, were not compared with transformers: that many do not fit"
    carried = open_scorer(_carried(bundle), run.memory, run.progress)
    graph = _place(run, bundle).open(full_precision(bundle.model()))
    rows = [document.tokens for document in run.documents]
    found = filled_context.compare_filled(carried, graph, rows, filled, run.pair.vocabulary)
    results = [result for gate in judging for result in judge(gate, found)] if found else []
    return results, [said] if filled < length else []


def _place(run: Run, bundle: Bundle) -> GraphPlace:
    return GraphPlace(bundle.directory, bundle.target, run.store.directory, run.memory, run.progress)


def _carried(bundle: Bundle) -> Fp32Model:
    """F: transformers over the bundle's weights, dequantized."""
    return Fp32Model(
        "F",
        lambda: load_weights(bundle.directory, dict(bundle.values())),
        lambda: carried_blocks(bundle.directory, bundle.weights),
        sum(4 * math.prod(weight.shape) for weight in bundle.weights.values()),
        bundle.content,
    )


def _runner(bundle: Bundle) -> Runner:
    """The Runner as `load` makes it, for bundles without a manifest too: the files were hashed above."""
    config, adapter = read_json(bundle.directory / "config.json"), bundle.adapter
    plain = GraphBundle(bundle.directory, bundle.format, bundle.target, bundle.graph)
    session = open_session(bundle.graph, bundle.target, None)
    if bundle.is_traced:
        require_known_interface(session)
    kind = CopyingRunner if bundle.is_traced else Runner
    runner = kind(
        session,
        adapter.exported if adapter else plain,
        provider=bundle.target,
        n_positions=context(config),
        vocab_size=int(config["vocab_size"]),
        stop_tokens=stop_tokens(bundle.directory, config),
    )
    return runner.with_adapter(adapter.name) if adapter else runner


def _subject(run: Run, bundle: Bundle) -> GraphSubject:
    """One short document for graph mutants, with F's logits at all of its positions (the store has the scored ones)."""
    document = min(run.documents, key=lambda one: abs(len(one.tokens) - SHORT))
    row = document.tokens[: min(SHORT, run.pair.context - 1)]
    carried = open_scorer(_carried(bundle), run.memory, run.progress)
    rows = (row, row[: max(2, len(row) // 2)])
    graph, place = bundle.model(), _place(run, bundle)
    return GraphSubject(graph, bundle, row, carried.logits(row), rows, place.open)


def _logit_gates(run: Run, gates: Sequence[Gate], pairs: BundlePairs) -> list[GateResult]:
    results = [finiteness(comparison) for comparison in pairs.comparisons.values()]
    results += [counted(name, len(one.tokens.kl), run.store) for name, one in pairs.comparisons.items()]
    live = [("R", "O"), ("R", "T")] if isinstance(run.reference, LiveReference) else []
    results += apart([pairs.comparisons["R-O"], pairs.comparisons["T-R"]])
    results += distinct(run.store, [("T", "B"), ("F", "B"), ("O", "B"), *live])
    for gate in gates:
        if gate.pair in pairs.comparisons:
            results += judge(gate, pairs.comparisons[gate.pair])
    return results


def _feeding_gates(gates: Sequence[Gate], fed: Fed) -> list[GateResult]:
    results = []
    for name, checks in (("O-D", fed.cache), ("O-P", fed.padding)):
        comparison = feeding.comparison(name, checks)
        results.append(finiteness(comparison))
        for gate in gates:
            if gate.pair == name:
                results += judge(gate, comparison)
    return results


def _summaries(fed: Fed) -> list[CacheCheck]:
    return [*feeding.summaries(fed.cache), *feeding.summaries(fed.padding)]


def _drop_bundle(run: Run) -> None:
    for model in ("F", "O", "O1"):
        run.store.drop(model)


def _invalid(survivors: Sequence[str]) -> list[Verdict]:
    return ["INCONCLUSIVE"] if survivors else []
