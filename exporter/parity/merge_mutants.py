"""The kill matrix of the weights: deliberate errors that named gates must see. A check that cannot fail proves nothing.

They change the weights read back from the bundle, one target at a time, and meet the weight gates: in a deep model one
dropped layer is a hundredth of KL(T||B), and no KL gate sees it. A mutant that equals the original for this model is
"not applicable", with the proof.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from exporter.graph.weights import Quantized, Weight
from exporter.merging.threads import thread_pool
from exporter.parity.bundles import Bundle, quantization_steps
from exporter.parity.elements import (
    Float,
    Rounding,
    Rows,
    allowed_roundings,
    elements_pass,
    read_values,
    round_to,
    row_blocks,
    within_step,
)
from exporter.parity.gates import ProjectionLimits
from exporter.parity.merge_mutations import MergeMutation, merge_mutations
from exporter.parity.onto import onto_share
from exporter.parity.oracle import Adapted, Oracle
from exporter.parity.projection import is_projected, judge_projection, project
from exporter.parity.result import Mutant
from exporter.parity.weights import canonical_weights
from exporter.progress import SILENT, Progress
from exporter.sources.tensors import TensorInfo
from exporter.sources.values import read_tensor

PROJECTION, ELEMENTS, STEP = "weights.projection", "weights.elements", "weights.step"
UNTOUCHED, ONTO = "weights.untouched", "weights.onto"


def merge_mutants(
    bundle: Bundle, oracle: Oracle, limits: ProjectionLimits, progress: Progress = SILENT
) -> list[Mutant]:
    """Each mutation in each target alone: it must be seen in every one, so that it is seen in any one."""
    weights = canonical_weights(bundle, oracle)
    tallies: dict[str, _Tally] = {mutation.name: _Tally() for mutation in merge_mutations()}
    expected = {PROJECTION}
    other: Adapted | None = None
    with (
        thread_pool() as pool,
        progress.task("mutants of the weights", len(oracle.names), "tensors") as task,
    ):
        for name in oracle.names:
            adapted = other if other is not None and other.name == name else oracle.merge(name)
            following = _same_shape(name, oracle)
            other = oracle.merge(following) if following else None
            weight = weights[name]
            expected |= {STEP} if isinstance(weight, Quantized) and _is_known(weight, adapted) else set()
            expected |= set() if isinstance(weight, Quantized) else {ELEMENTS}
            roundings = _roundings(bundle, weight, oracle.base_info(name))
            target = _Target(adapted, other, weight, read_values(weight), roundings, limits)
            mutations = merge_mutations([adapted])
            for mutation, found in zip(mutations, pool.map(target.tried, mutations), strict=True):
                tallies.setdefault(mutation.name, _Tally()).add(name, found)
            task.advance()
    found = [tally.mutant(name, tuple(sorted(expected, reverse=True))) for name, tally in tallies.items()]
    if oracle.onto == "int8":
        found.append(_onto_mutant(bundle, weights, oracle, limits))
    return found


def _roundings(bundle: Bundle, weight: Weight, base: TensorInfo) -> list[Rounding]:
    """The ways to the stored type, a merge's own last; none to codes."""
    return [] if isinstance(weight, Quantized) else allowed_roundings(weight, base, bundle.merge_dtype)


def _is_known(weight: Weight, adapted: Adapted) -> bool:
    """True where every element of the right weight is known: replaced values, and targets that training left alone."""
    return adapted.is_exact or not is_projected(weight, adapted)


@dataclass(frozen=True, slots=True)
class _Target:
    """One adapted weight as it stands in the bundle; other: the target whose change a shuffled layer would carry."""

    adapted: Adapted
    other: Adapted | None
    weight: Weight
    stored: Float
    roundings: Sequence[Rounding]
    limits: ProjectionLimits

    def tried(self, mutation: MergeMutation) -> set[str] | str:
        """The gates that see it, or why it is no error here."""
        adapted, delta = self.adapted, mutation.change(self.adapted, self.other)
        if isinstance(delta, str):
            return delta
        if not any((delta(rows) != adapted.delta_of(rows)).any() for rows in row_blocks(self.stored)):
            return f"{adapted.name}: equals the original, max |difference| = 0"
        if _is_below_rounding(self.weight, adapted, delta, self.roundings):
            return f"{adapted.name}: the same bundle, for what it changes is lost in rounding"
        return _killers(self.stored, adapted, delta, self.weight, self.roundings, self.limits)


def _same_shape(name: str, oracle: Oracle) -> str | None:
    """The next target whose weight has the same shape, or simply the next one; None where there is no other."""
    at = oracle.names.index(name)
    others = oracle.names[at + 1 :] + oracle.names[:at]
    shape = oracle.base_info(name).shape
    return next((one for one in others if oracle.base_info(one).shape == shape), others[0] if others else None)


def _is_below_rounding(weight: Weight, adapted: Adapted, delta: Rows, roundings: Sequence[Rounding]) -> bool:
    """True where a faulty merge gives the very bytes of the right one, or one that no quantized weight can tell."""
    if not _is_known(weight, adapted):
        return False
    blocks = row_blocks(adapted.merged)
    if isinstance(weight, Quantized):
        steps = np.broadcast_to(quantization_steps(weight)[0].numpy(), adapted.merged.shape)
        return all(bool((np.abs(delta(rows) - adapted.delta_of(rows)) <= steps[rows]).all()) for rows in blocks)
    return all(
        np.array_equal(
            round_to(adapted.original[rows] + delta(rows), *roundings[-1]),
            round_to(adapted.merged[rows], *roundings[-1]),
        )
        for rows in blocks
    )


def _killers(
    stored: Float,
    adapted: Adapted,
    delta: Rows,
    weight: Weight,
    roundings: Sequence[Rounding],
    limits: ProjectionLimits,
) -> set[str]:
    """The gates that see a bundle into which `delta` was merged. A quantized bundle keeps its quantization noise."""
    killers = set()
    if isinstance(weight, Quantized):

        def wrong(rows: slice) -> Float:
            return stored[rows] + (delta(rows) - adapted.delta_of(rows))

        if _is_known(weight, adapted) and not within_step(weight, wrong(slice(None)), adapted.merged):
            killers.add(STEP)
    else:

        def wrong(rows: slice) -> Float:
            return round_to(adapted.original[rows] + delta(rows), *roundings[-1])

        if not elements_pass(wrong, adapted, roundings):
            killers.add(ELEMENTS)
    if is_projected(weight, adapted) and judge_projection(project(wrong, adapted), limits) == "FAIL":
        killers.add(PROJECTION)
    return killers


def _onto_mutant(bundle: Bundle, weights: Mapping[str, Weight], oracle: Oracle, limits: ProjectionLimits) -> Mutant:
    """The same adapter merged onto the base's own weights: every weight that stands on codes is off by q = W - W_int8.

    What PEFT would make of W is W' + q: exactly so for sums, and to the order of the change for other methods.
    """
    name, killers, tensors = (
        "merged onto the original base",
        {ELEMENTS: True, UNTOUCHED: True},
        {ELEMENTS: 0, UNTOUCHED: 0},
    )
    for one in oracle.int8_names:
        weight = weights.get(one)
        if weight is None or isinstance(weight, Quantized):
            continue
        info = oracle.base_info(one)
        own = read_tensor(info)
        if one in oracle.names:
            adapted = oracle.merge(one)
            if adapted.is_exact:
                continue
            roundings = allowed_roundings(weight, info, bundle.merge_dtype)
            wrong = round_to(adapted.merged + own.double().numpy() - adapted.original, *roundings[-1])
            gate, seen = ELEMENTS, not elements_pass(wrong.__getitem__, adapted, roundings)
        else:
            values = oracle.original(one).double().numpy()
            gate, seen = UNTOUCHED, not np.array_equal(own.double().numpy(), round_to(values, info.dtype))
        killers[gate] &= seen
        tensors[gate] += 1
    share = onto_share(weights, oracle, shifted=True)
    if share is None:
        return Mutant(name, "merge", "not applicable", (ONTO,), (), "every weight on codes was replaced by the adapter")
    judged = [gate for gate, count in tensors.items() if count]
    seen_by = [gate for gate in judged if killers[gate]] + ([ONTO] if share.judge(limits) == "FAIL" else [])
    expected, killed_by = (*judged, ONTO), tuple(seen_by)
    detail = f"share of the base's own weights {share.share:.4f} with se {share.error:.2g}"
    return Mutant(name, "merge", "killed" if killed_by else "survived", expected, killed_by, detail)


class _Tally:
    """What happened to one mutation over all targets."""

    def __init__(self) -> None:
        self.killers: dict[str, set[str]] = {}
        self.reasons: list[str] = []

    def add(self, tensor: str, found: set[str] | str) -> None:
        """The gates that saw it in one tensor, or why it is no error there."""
        if isinstance(found, str):
            self.reasons.append(found)
        else:
            self.killers[tensor] = found

    def mutant(self, name: str, expected: tuple[str, ...]) -> Mutant:
        if not self.killers:
            return Mutant(
                name, "merge", "not applicable", expected, (), self.reasons[0] if self.reasons else "no target"
            )
        survivors = [tensor for tensor, killers in self.killers.items() if not killers]
        seen_everywhere = set.intersection(*self.killers.values())
        if survivors:
            detail = f"unseen in {len(survivors)} of {len(self.killers)} tensors, such as {survivors[0]}"
            return Mutant(name, "merge", "survived", expected, (), detail)
        killed_by = tuple(gate for gate in expected if gate in seen_everywhere) or tuple(
            sorted(set.union(*self.killers.values()))
        )
        return Mutant(name, "merge", "killed", expected, killed_by, f"in each of {len(self.killers)} tensors alone")
