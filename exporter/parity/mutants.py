"""The kill matrix: deliberate errors that named gates must see. A check that cannot fail proves nothing.

Merge mutants change the weights read back from the bundle, one target at a time, and meet the weight gates: in a deep
model one dropped layer is a hundredth of KL(T||B), and no KL gate sees it. Graph mutants run on one short document and
meet the logit gates. A mutant that equals the original for this model is "not applicable", with the proof.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from numpy.typing import NDArray

from exporter.graph.weights import Quantized, Weight
from exporter.merging.threads import thread_pool
from exporter.parity.bundles import Bundle, quantization_steps
from exporter.parity.feeding import DECODED, comparison, decode_calls, padded_call, pair, real_positions
from exporter.parity.gates import Gate, ProjectionLimits, finiteness, judge
from exporter.parity.graphs import (
    Call,
    Graph,
    full_precision,
    not_a_number,
    relu_activation,
    wrong_activation,
    wrong_qkv_order,
)
from exporter.parity.oracle import Adapted, Oracle
from exporter.parity.result import GateResult, Mutant
from exporter.parity.statistics import PairTokens
from exporter.parity.weights import (
    Rounding,
    Rows,
    allowed_roundings,
    canonical_weights,
    elements_pass,
    is_projected,
    judge_projection,
    onto_share,
    project,
    read_values,
    round_to,
    row_blocks,
    within_step,
)
from exporter.progress import SILENT, Progress
from exporter.sources.tensors import TensorInfo
from exporter.sources.values import read_tensor

Float = NDArray[np.float64]
PROJECTION, ELEMENTS, STEP = "weights.projection", "weights.elements", "weights.step"
UNTOUCHED, ONTO = "weights.untouched", "weights.onto"


@dataclass(frozen=True, slots=True)
class MergeMutation:
    """`change(adapted, next)` gives rows of the delta that the faulty merge would add, or why there is none."""

    name: str
    change: Callable[[Adapted, Adapted | None], Rows | str]


def merge_mutations(adapted: Sequence[Adapted] = ()) -> list[MergeMutation]:
    """The mutations of every merge, and those of what is among `adapted`: DoRA, replaced values."""
    mutations = [
        MergeMutation("adapter dropped", lambda a, _: lambda rows: np.zeros_like(a.merged[rows])),
        MergeMutation("scale x 0.5", lambda a, _: _times(0.5, a)),
        MergeMutation("scale x 0.9", lambda a, _: _times(0.9, a)),
        MergeMutation("scale x 2", lambda a, _: _times(2, a)),
        MergeMutation("alpha instead of alpha / r", _alpha_alone),
        MergeMutation("merged twice", lambda a, _: lambda rows: a.delta_of(rows) + a.delta_of(rows)),
        MergeMutation("layers shuffled", _next_layer),
        MergeMutation("q, k, v swapped", _thirds_swapped),
        MergeMutation("transposed", _transposed),
        MergeMutation("rows shuffled", lambda a, _: _rolled(a, 1)),
    ]
    if any(one.plain is not None for one in adapted):
        mutations.append(MergeMutation("magnitude left out", _without_magnitude))
    if any(one.is_exact for one in adapted):
        mutations.append(MergeMutation("one replaced row reverted", _row_reverted))
    return mutations


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


def _times(factor: float, adapted: Adapted) -> Rows:
    return lambda rows: factor * adapted.delta_of(rows)


def _rolled(adapted: Adapted, shift: int) -> Rows:
    """Rows of np.roll(delta, shift, axis=0)."""

    def rolled(rows: slice) -> Float:
        at = np.arange(len(adapted.merged))[rows] - shift
        return adapted.merged.take(at, 0, mode="wrap") - adapted.original.take(at, 0, mode="wrap")

    return rolled


def _alpha_alone(adapted: Adapted, _: Adapted | None) -> Rows | str:
    if not adapted.alphas:
        return f"{adapted.name}: no alpha"
    if len(adapted.ranks) != 1:
        return "several adapters: no single alpha"
    if adapted.alphas[0] == adapted.scalings[0]:
        return f"alpha / r = alpha: r = {adapted.ranks[0]}"
    return _times(adapted.alphas[0] / adapted.scalings[0], adapted) if adapted.scalings[0] else "the scaling is 0"


def _next_layer(adapted: Adapted, other: Adapted | None) -> Rows | str:
    if other is None:
        return "one target: nothing to shuffle with"
    if other.merged.shape != adapted.merged.shape:
        return f"{adapted.name} and {other.name} differ in shape: {adapted.merged.shape}, {other.merged.shape}"
    return other.delta_of


def _thirds_swapped(adapted: Adapted, _: Adapted | None) -> Rows | str:
    """k|v|q instead of q|k|v, along the columns or the rows."""
    shape = adapted.merged.shape
    if len(shape) != 2:
        return f"{adapted.name} {shape} is no matrix"
    rows, columns = shape
    if columns == 3 * rows:
        return lambda some: np.roll(adapted.delta_of(some), -rows, axis=1)
    return _rolled(adapted, -columns) if rows == 3 * columns else f"{adapted.name} {shape} is no packed q|k|v"


def _transposed(adapted: Adapted, _: Adapted | None) -> Rows | str:
    shape = adapted.merged.shape
    if len(shape) != 2 or shape[0] != shape[1]:
        return f"{adapted.name} {shape} is not square"
    return lambda rows: adapted.merged.T[rows] - adapted.original.T[rows]


def _without_magnitude(adapted: Adapted, _: Adapted | None) -> Rows | str:
    plain = adapted.plain
    return f"{adapted.name}: no magnitude" if plain is None else lambda rows: plain[rows] - adapted.original[rows]


def _row_reverted(adapted: Adapted, _: Adapted | None) -> Rows | str:
    """The row (or number) that the adapter changed most is the base's again."""
    if not adapted.is_exact:
        return f"{adapted.name} is not replaced"
    delta = adapted.delta
    size = np.abs(delta) if delta.ndim == 1 else np.linalg.norm(delta.reshape(len(delta), -1), axis=1)
    delta[size.argmax()] = 0
    return delta.__getitem__


@dataclass(frozen=True, slots=True)
class GraphSubject:
    """What graph mutants are tried on: F's logits of one short document, and rows for a padded batch."""

    model: onnx.ModelProto
    bundle: Bundle
    row: tuple[int, ...]
    carried: NDArray[np.float32]  # (T, V) of F, the model that carries the bundle's weights
    rows: tuple[tuple[int, ...], ...]
    open: Callable[[onnx.ModelProto], Graph]  # in memory, or range by range


def graph_mutants(subject: GraphSubject, gates: Sequence[Gate]) -> list[Mutant]:
    """Graph faults, each killed by the gate named for it."""
    model, bundle = full_precision(subject.model), subject.bundle
    # A cuda graph computes in float16: there only the KL gate holds.
    judged = [gate for gate in gates if gate.pair == "F-O1"] or [gate for gate in gates if gate.id == "graph.kl"]
    cache = [gate for gate in gates if gate.id.startswith("cache.")]
    padding = [gate for gate in gates if gate.id.startswith("padding.")]
    row, half = subject.row, max(2, len(subject.row) // 2)
    positions = np.arange(len(row))
    positions[len(row) // 2 :] += 1  # a rotary model knows distances only, and does not see all of them moved
    shifted = Call(np.array([row]), positions=positions[None])
    has_positions = any(value.name == "position_ids" for value in model.graph.input)
    reason = "the graph takes no position_ids: it finds the positions itself"
    unmoved = Mutant("positions + 1", "graph", "not applicable", tuple(gate.id for gate in judged), (), reason)
    # A few steps show it, and at full precision each costs as much as a whole document.
    stop = min(len(row), half + DECODED)
    stale = decode_calls(row[:stop], half, 2, is_stale=True)
    batch = sorted(subject.rows, key=len)
    alone = [Call(np.array([one])) for one in batch]
    blind = padded_call(batch, "left", 0, honest_mask=False)
    straight, moved, *rest = subject.open(model).run([Call(np.array([row])), shifted, *stale, *alone, blind])
    stale_logits, alone_logits = rest[1 : len(stale)], rest[len(stale) : -1]
    mutants = [
        _meet("positions + 1", judged, "F-O1", pair(subject.carried, moved[0])) if has_positions else unmoved,
        _meet(
            "stale cache slot",
            cache,
            "O-D",
            pair(straight[0][half:stop], np.concatenate([one[0] for one in stale_logits])),
        ),
    ]
    if bundle.target == "cpu":
        real = rest[-1][real_positions(batch, "left")]
        together = pair(np.concatenate([one[0] for one in alone_logits]), real)
        mutants.append(_meet("padding not masked", padding, "O-P", together))
    else:
        reason = "rows are padded on the right only, and no position sees a later one"
        expected = tuple(gate.id for gate in padding)
        mutants.append(Mutant("padding not masked", "graph", "not applicable", expected, (), reason))
    activation = wrong_activation if bundle.target == "cpu" else relu_activation
    for name, change, lacking in (
        ("wrong activation", activation, "the graph has no activation that is known here"),
        ("q, k, v out of order", wrong_qkv_order, "the graph packs no q, k, v into one input of attention"),
    ):
        wrong = change(model)
        if wrong is None:
            expected = tuple(gate.id for gate in judged)
            mutants.append(Mutant(name, "graph", "not applicable", expected, (), lacking))
            continue
        mutants.append(_meet(name, judged, "F-O1", pair(subject.carried, subject.open(wrong).logits(row))))
    logits = subject.open(not_a_number(model)).logits(row)
    mutants.append(_meet_finiteness("NaN in the logits", pair(subject.carried, logits)))
    return mutants


def _meet(name: str, gates: Sequence[Gate], pair_name: str, tokens: PairTokens) -> Mutant:
    """Let the gates judge the mutant's logits. On one document only exact figures are judged."""
    exact = [replace(gate, bound="exact", scopes=("all",), tokens=1, documents=1) for gate in gates]
    results: list[GateResult] = []
    for gate in exact:
        results += judge(gate, comparison(pair_name, [(name, tokens)]))
    killed_by = tuple(result.gate for result in results if result.outcome == "FAIL")
    detail = f"centered max {tokens.centered_max.max():.3g}, mean KL {tokens.kl.mean():.3g}"
    outcome = "killed" if killed_by else "survived"
    return Mutant(name, "graph", outcome, tuple(gate.id for gate in gates), killed_by, detail)


def _meet_finiteness(name: str, tokens: PairTokens) -> Mutant:
    result = finiteness(comparison("F-O1", [(name, tokens)]))
    killed = result.outcome == "FAIL"
    return Mutant(
        name, "logits", "killed" if killed else "survived", ("finite",), ("finite",) if killed else (), result.detail
    )
