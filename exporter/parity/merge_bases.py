"""Merging onto the base's own weights or onto its int8 codes: which is nearer to the 8-bit reference, which to fp32.

q = W - W_int8 is what 8-bit loading does to a weight. An adapter that was trained on the 8-bit base may count on it;
||q|| / ||delta|| says how much there is to count on. The other base's merge is stood for by its unmerged fp32 model,
which `peft-merge.max` holds equal to it for this base.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from exporter.parity.attribution import Chain
from exporter.parity.bases import BaseOptions, meta_model
from exporter.parity.blocks_choice import Fp32Model, Memory, score_fp32
from exporter.parity.blocks_specs import truth_blocks
from exporter.parity.by_document import by_document
from exporter.parity.documents import Document, Level
from exporter.parity.gates import Comparison, per_document
from exporter.parity.inputs import Pair
from exporter.parity.int8_base import Onto, int8_modules, int8_values
from exporter.parity.intervals import ratio, studentized_bootstrap
from exporter.parity.models import TruthModels, parameter_count
from exporter.parity.oracle import Oracle
from exporter.parity.pairs import blocks, stages
from exporter.parity.reference import LiveReference, LiveRows, Reference
from exporter.parity.result import CodesError, MergeBase, MergeBases, Stage, number
from exporter.parity.scoring import LogitStore
from exporter.parity.statistics import kl_divergence, score
from exporter.progress import SILENT, Progress
from exporter.sources.values import read_tensor

CHEAP = 200_000_000  # parameters up to which both bases are scored at `commit` too
Float = NDArray[np.float64]


def compare_merge_bases(
    pair: Pair,
    oracle: Oracle,
    store: LogitStore,
    reference: Reference,
    merged: Comparison,
    level: Level,
    memory: Memory,
    progress: Progress = SILENT,
) -> MergeBases:
    """merged: the pair T-M32 of the base that was merged onto. Scores the other base unless that is too much here."""
    tensors = codes_errors(oracle, progress)
    if level == "commit" and parameter_count(pair.base) > CHEAP:
        return MergeBases((), tensors)
    other: Onto = "original" if oracle.onto == "int8" else "int8"
    options, nbytes = BaseOptions(other, pair.rows), parameter_count(pair.base) * 4
    model = Fp32Model(
        "D",
        lambda: TruthModels(pair.base, pair.weighted, options).truth(),
        lambda: truth_blocks(pair.base, pair.weighted, options),
        nbytes,
    )
    score_fp32(store, model, memory, progress)
    # Onto int8 it is the store's T that stands on the codes, and its D that does not.
    order = ("T", "D", "R") if oracle.onto == "original" else ("D", "T", "R")

    def compared(document: Document) -> tuple[dict[str, list[Float]], Chain]:
        columns: dict[str, list[Float]] = {"R-M32": [], "R-D": [], "T-D": [], "D-M32": []}
        chain = _chain()
        for rows, targets in blocks(document, store.vocabulary):
            view = {name: score(store.read(name, document, rows), targets) for name in ("T", "M32", "D")}
            theirs = reference.at(document, rows, targets)
            for name in ("M32", "D"):
                columns[f"R-{name}"].append(theirs.pair_to(view[name]).kl)
            columns["T-D"].append(kl_divergence(view["T"].log_p, view["D"].log_p, view["T"].p))
            columns["D-M32"].append(kl_divergence(view["D"].log_p, view["M32"].log_p, view["D"].p))
            if isinstance(theirs, LiveRows):
                views = [theirs.scored if name == "R" else view[name] for name in order]
                chain.add([one.log_p for one in views], [one.p for one in views])
        return columns, chain

    found = by_document(store.documents, compared, "compare the other base", progress)
    chain = _chain()
    for _, one in found:
        chain.include(one)
    store.drop("D")
    kl = {name: np.concatenate([part for columns, _ in found for part in columns[name]]) for name in found[0][0]}
    zero = np.zeros(len(merged.document))
    if oracle.onto == "original":
        to_truth = {"original": merged.tokens.kl, "int8": kl["T-D"]}
        to_reference = {"original": kl["R-M32"], "int8": kl["R-D"]}
    else:
        to_truth = {"original": zero, "int8": kl["D-M32"]}
        to_reference = {"original": kl["R-D"], "int8": kl["R-M32"]}
    ladder: tuple[Stage, ...] = stages(chain) if isinstance(reference, LiveReference) else ()
    bases = tuple(_base(onto, merged.document, to_reference[onto], to_truth[onto]) for onto in ("original", "int8"))
    return MergeBases(bases, tensors, ladder)


def _chain() -> Chain:
    return Chain("T to R", ("T", "D", "R"))


def codes_errors(oracle: Oracle, progress: Progress = SILENT) -> tuple[CodesError, ...]:
    """||q|| / ||delta|| of every adapted weight that 8-bit loading converts. Needs weights alone."""
    model = meta_model(oracle.base.directory)
    converted = {oracle.canonical(f"{name}.weight"): transposed for name, transposed in int8_modules(model).items()}
    names = [name for name in oracle.names if name in converted]
    found = []
    with progress.task("errors of the base's 8-bit codes", len(names), "tensors") as task:
        for name in names:
            weight = read_tensor(oracle.base_info(name))
            codes = int8_values(weight, transposed=converted[name], name=name).double().numpy()
            error = float(np.linalg.norm(weight.double().numpy() - codes))
            delta = float(np.linalg.norm(oracle.merge(name).delta))
            found.append(CodesError(name, error / delta if delta else None, error / float(weight.double().norm())))
            task.advance()
    return tuple(found)


def _base(onto: Onto, document: NDArray[np.int64], to_reference: Float, to_truth: Float) -> MergeBase:
    one, two = (_bounds(document, values) for values in (to_reference, to_truth))
    return MergeBase(onto, *one, *two)


def _bounds(document: NDArray[np.int64], values: Float) -> Sequence[float | None]:
    bounds = studentized_bootstrap(per_document(document, [values, np.ones(len(values))]), ratio)
    return number(bounds.estimate), number(bounds.lower), number(bounds.upper)
