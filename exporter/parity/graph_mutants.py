"""The kill matrix of the graph: deliberate errors that run on one short document and meet the logit gates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from numpy.typing import NDArray

from exporter.parity.bundles import Bundle
from exporter.parity.feeding import DECODED, comparison, decode_calls, padded_call, pair, real_positions
from exporter.parity.gates import Gate, finiteness, judge
from exporter.parity.graphs import (
    Call,
    Graph,
    full_precision,
    not_a_number,
    relu_activation,
    wrong_activation,
    wrong_qkv_order,
)
from exporter.parity.result import GateResult, Mutant
from exporter.parity.statistics import PairTokens


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
