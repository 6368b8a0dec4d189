"""One pass over the stored logits: every pair's statistics, the stage ladder, and what the report draws."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from exporter.parity.attribution import Chain
from exporter.parity.by_document import by_document
from exporter.parity.documents import Document
from exporter.parity.gates import Comparison, measure
from exporter.parity.reference import Reference
from exporter.parity.result import GateResult, Histogram, PositionKL, Stage, WorstToken, number
from exporter.parity.scoring import LogitStore
from exporter.parity.statistics import PairTokens, Scored, compare, concatenate, kl_divergence, score
from exporter.progress import SILENT, Progress

BLOCK_BYTES = 1 << 20  # of one model's float64 at once: what a pair takes stays in a core's own cache
WORST = 20
CONTEXT_TOKENS = 24
EDGES = tuple(round(-9 + 0.25 * i, 2) for i in range(45))  # log10 KL, 1e-9 to 1e2
RECORDED = ("kl_mean", "kl_median", "kl_p99", "kl_max", "top1", "top1_clear", "delta_p_rms", "ln_ppl_ratio", "nmse")


@dataclass(frozen=True, slots=True)
class Where:
    """Document, scope and position of every scored token, in store order; all (N,)."""

    document: NDArray[np.int64]
    scope: NDArray[np.str_]
    position: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class CommonPairs:
    """What does not depend on a bundle: T-M32, T-R, and the KL arrays that bundle gates need beside their own."""

    where: Where
    merge: Comparison
    reference: Comparison
    reference_to_truth: NDArray[np.float64]  # (N,) KL(R||T)
    truth_to_base: NDArray[np.float64]  # (N,) KL(T||B)


@dataclass(frozen=True, slots=True)
class BundlePairs:
    """All comparisons of one bundle by pair name, and the ladder."""

    comparisons: dict[str, Comparison]
    stages: tuple[Stage, ...]
    reference_top: NDArray[np.int64]  # (N,) T's best token
    candidate_top: NDArray[np.int64]  # (N,) O's best token


def blocks(document: Document, vocabulary: int) -> Iterator[tuple[slice, NDArray[np.int64]]]:
    """(rows of the document's scored positions, their true tokens)."""
    targets, size = document.targets, max(1, BLOCK_BYTES // (8 * vocabulary))
    for start in range(0, len(targets), size):
        rows = slice(start, min(start + size, len(targets)))
        yield rows, targets[rows]


def locate(documents: Sequence[Document]) -> Where:
    return Where(
        np.concatenate([np.full(len(document.positions), document.index) for document in documents]),
        np.concatenate([document.target_scopes for document in documents]),
        np.concatenate([document.positions + 1 for document in documents]),
    )


def common_pairs(store: LogitStore, reference: Reference, progress: Progress = SILENT) -> CommonPairs:
    """One pass over T, B, M32 and R."""

    def compared(document: Document) -> tuple[PairTokens, PairTokens, NDArray, NDArray]:
        merge: list[PairTokens] = []
        to_reference: list[PairTokens] = []
        from_reference: list[NDArray] = []
        to_base: list[NDArray] = []
        for rows, targets in blocks(document, store.vocabulary):
            truth, base, merged = (score(store.read(one, document, rows), targets) for one in ("T", "B", "M32"))
            theirs = reference.at(document, rows, targets)
            merge.append(compare(truth, merged, targets))
            to_reference.append(theirs.pair_from(truth))
            from_reference.append(theirs.pair_to(truth).kl)
            to_base.append(kl_divergence(truth.log_p, base.log_p, truth.p))
        return concatenate(merge), concatenate(to_reference), np.concatenate(from_reference), np.concatenate(to_base)

    found = by_document(store.documents, compared, "compare the references", progress)
    merge, to_reference, from_reference, to_base = zip(*found, strict=True)
    where, gain = locate(store.documents), np.concatenate(to_base)
    return CommonPairs(
        where,
        Comparison("T-M32", concatenate(merge), where.document, where.scope, gain),
        Comparison("T-R", concatenate(to_reference), where.document, where.scope),
        np.concatenate(from_reference),
        gain,
    )


def bundle_pairs(
    store: LogitStore, reference: Reference, common: CommonPairs, quantized: bool, progress: Progress = SILENT
) -> BundlePairs:
    """One pass over T, M32, R, F, O and, where the bundle is quantized, O1."""
    models = ("T", "M32", "F", "O", *(("O1",) if quantized else ()))
    pairs = ("M32-F", "F-O", "T-F", "T-O", *(("F-O1",) if quantized else ()))

    def compared(document: Document) -> tuple[dict[str, PairTokens], Chain, NDArray]:
        parts: dict[str, list[PairTokens]] = {name: [] for name in (*pairs, "R-O")}
        chain = _chain()
        tops: list[NDArray] = []
        for rows, targets in blocks(document, store.vocabulary):
            view = {model: score(store.read(model, document, rows), targets) for model in models}
            for name in pairs:
                a, b = name.split("-")
                parts[name].append(compare(view[a], view[b], targets))
            parts["R-O"].append(reference.at(document, rows, targets).pair_to(view["O"]))
            _add_to_chain(chain, view)
            tops.append(np.stack([view["T"].top, view["O"].top]))
        return {name: concatenate(tokens) for name, tokens in parts.items()}, chain, np.concatenate(tops, axis=1)

    found = by_document(store.documents, compared, "compare the bundle", progress)
    tokens = {name: concatenate([parts[name] for parts, _, _ in found]) for name in (*pairs, "R-O")}
    if not quantized:
        tokens["F-O1"] = tokens["F-O"]
    chain = _chain()
    for _, one, _ in found:
        chain.include(one)
    where = common.where
    other = {"R-O": common.reference_to_truth, "T-O": common.truth_to_base}
    comparisons = {
        name: Comparison(name, tokens[name], where.document, where.scope, other.get(name))
        for name in ("M32-F", "F-O", "F-O1", "T-F", "T-O", "R-O")
    }
    best = np.concatenate([tops for _, _, tops in found], axis=1)
    return BundlePairs(comparisons | {"T-M32": common.merge, "T-R": common.reference}, stages(chain), best[0], best[1])


def _chain() -> Chain:
    return Chain("T to O", ("T", "M32", "F", "O"))


def stages(chain: Chain) -> tuple[Stage, ...]:
    shares = chain.shares() or [None] * len(chain.steps)
    return tuple(
        Stage(chain.name, step, share, number(kl))
        for step, share, kl in zip(chain.steps, shares, chain.kl(), strict=True)
    )


def recorded(comparison: Comparison) -> list[GateResult]:
    """Figures of a pair that no gate judges, over all tokens."""
    rows = np.ones(len(comparison.document), bool)
    results = []
    for statistic in RECORDED:
        bounds = measure(statistic, comparison, rows)
        results.append(
            GateResult(
                gate="recorded",
                pair=comparison.pair,
                statistic=statistic,
                scope="all",
                outcome="RECORDED",
                kind="correctness",
                estimate=number(bounds.estimate),
                lower=number(bounds.lower),
                upper=number(bounds.upper),
                limit=None,
                bound="none",
                tokens=len(rows),
                documents=len(np.unique(comparison.document)),
            )
        )
    return results


def histogram(comparison: Comparison) -> Histogram:
    logs = np.log10(np.maximum(comparison.tokens.kl, 10 ** EDGES[0]))
    counts, _ = np.histogram(np.clip(logs, EDGES[0], EDGES[-1]), bins=np.array(EDGES))
    return Histogram(comparison.pair, EDGES, tuple(int(count) for count in counts))


def by_position(comparison: Comparison, where: Where) -> tuple[PositionKL, ...]:
    """Mean KL in up to 16 ranges of positions with about equally many tokens each."""
    edges = np.unique(np.quantile(where.position, np.linspace(0, 1, 17)).astype(int))
    edges[-1] += 1
    found = []
    for start, stop in pairwise(edges):
        inside = (where.position >= start) & (where.position < stop)
        if inside.any():
            found.append(
                PositionKL(int(start), int(stop), float(comparison.tokens.kl[inside].mean()), int(inside.sum()))
            )
    return tuple(found)


def worst_tokens(
    pairs: BundlePairs, where: Where, documents: Sequence[Document], tokenizer: Tokenizer
) -> tuple[WorstToken, ...]:
    """The tokens with the largest KL(T||O), with what stood before them."""
    kl = pairs.comparisons["T-O"].tokens.kl
    found = []
    for i in np.argsort(-kl)[:WORST]:
        document, position = documents[int(where.document[i])], int(where.position[i])
        before = list(document.tokens[max(0, position - CONTEXT_TOKENS) : position])
        found.append(
            WorstToken(
                document=document.index,
                position=position,
                kl=float(kl[i]),
                context=tokenizer.decode(before, skip_special_tokens=False),
                token=tokenizer.decode([document.tokens[position]], skip_special_tokens=False),
                reference_top=tokenizer.decode([int(pairs.reference_top[i])], skip_special_tokens=False),
                candidate_top=tokenizer.decode([int(pairs.candidate_top[i])], skip_special_tokens=False),
            )
        )
    return tuple(found)


def _add_to_chain(chain: Chain, view: dict[str, Scored]) -> None:
    """Only positions that are finite in every model: one NaN would leave no shares at all."""
    finite = np.logical_and.reduce([view[model].finite for model in chain.models])
    views = [view[model] for model in chain.models]
    if finite.all():  # nothing is to be copied
        chain.add([one.log_p for one in views], [one.p for one in views])
    elif finite.any():
        chain.add([one.log_p[finite] for one in views], [one.p[finite] for one in views])
