"""Where a bundle's error comes from: the stage that erred, and the parts and tensors in which it stands.

Weights are judged tensor by tensor and graphs part by part, against models with the same weights; so a fault has its
stage and its place exactly. Where no single tensor or part is out of its bound, the ladder names the stage and the
swap of single layers the place.
"""

import re
from collections.abc import Sequence

from exporter.parity.layers import EMBEDDINGS, HEAD, block_name
from exporter.parity.result import GateResult, Layer, Origin, Projection, Stage
from exporter.parity.weights import Fault

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
GRAPH_PAIRS = ("F-O", "F-O1", "F-C", "O-D", "O-P")
FLOOR = 1e-9  # a part of a graph that is nearer than this to the model with the same weights is not at fault
BESIDE = 0.01  # parts with at least this much of the largest error are named too
SHOWN = 8


def find_origin(
    bundle_format: str,
    gates: Sequence[GateResult],
    faults: Sequence[Fault],
    projections: Sequence[Projection],
    stages: Sequence[Stage],
    layers: Sequence[Layer],
    parameters: Sequence[str],
) -> Origin | None:
    """None where no gate failed. parameters: all names of the model's state, in its order."""
    failed = [gate for gate in gates if gate.outcome == "FAIL"]
    if not failed:
        return None
    wrong_graph = [gate for gate in failed if gate.pair in GRAPH_PAIRS and gate.pair != "F-O"] or [
        gate for gate in failed if gate.pair == "F-O" and not _is_finite_of_weights(failed)
    ]
    named = [gate for gate in failed if gate.gate in ("weights.names", "weights.onto")]
    if faults and not (wrong_graph and _share(stages, "F -> O") > _share(stages, "M32 -> F")):
        return _of_weights(bundle_format, faults, projections, parameters)
    if named:
        return Origin("merge", (), (), named[0].detail)
    if wrong_graph:
        return _of_graph(wrong_graph, layers)
    return _of_ladder(bundle_format, failed, stages, layers)


def part_of(tensor: str, parameters: Sequence[str]) -> str:
    """The part that a tensor belongs to: its block by the first number in its name, else what stands before or after.

    parameters: all names in the model's order, in which the blocks stand together.
    """
    if match := NUMBER.search(tensor):
        return block_name(int(match[0]))
    first = next((i for i, name in enumerate(parameters) if NUMBER.search(name)), len(parameters))
    at = next((i for i, name in enumerate(parameters) if name == tensor or name.endswith(f".{tensor}")), first)
    return EMBEDDINGS if at < first else HEAD


def _of_weights(
    bundle_format: str, faults: Sequence[Fault], projections: Sequence[Projection], parameters: Sequence[str]
) -> Origin:
    """A quantized tensor whose steps are wrong while the adapter stands in it once was quantized wrongly."""
    unmerged = {fault.tensor for fault in faults if fault.gate == "weights.projection"}
    tensors = list(dict.fromkeys(fault.tensor for fault in faults))
    parts = tuple(dict.fromkeys(part_of(tensor, parameters) for tensor in tensors))
    if unmerged:
        tensors.sort(key=lambda name: name not in unmerged)
        shares = {p.tensor: p.share for p in projections}
        first = shares.get(tensors[0])
        detail = "" if first is None else f"the adapter's share in {tensors[0]} is {first:.4f} instead of 1"
        parts = tuple(dict.fromkeys(part_of(tensor, parameters) for tensor in tensors))
        return Origin("merge", parts[:SHOWN], tuple(tensors[:SHOWN]), detail)
    if bundle_format != "float":
        detail = f"{len(tensors)} tensor(s) further than a quantization step from the merged weight"
        return Origin("quantization", parts[:SHOWN], tuple(tensors[:SHOWN]), detail)
    if all(fault.is_rounding for fault in faults):
        detail = f"{len(tensors)} tensor(s) off by few units in the last place: not rounded once from PEFT's merge"
        return Origin("rounding", parts[:SHOWN], tuple(tensors[:SHOWN]), detail)
    detail = f"{len(tensors)} tensor(s) hold values that the merge of this base and adapter does not give"
    return Origin("merge", parts[:SHOWN], tuple(tensors[:SHOWN]), detail)


def _of_graph(failed: Sequence[GateResult], layers: Sequence[Layer]) -> Origin:
    errors = sorted(((layer.graph or 0.0, layer.part) for layer in layers), reverse=True)
    worst = errors[0][0] if errors else 0.0
    parts = tuple(part for error, part in errors if error > max(FLOOR, BESIDE * worst))
    gates = ", ".join(dict.fromkeys(gate.gate for gate in failed))
    if not parts:
        where = "no part of it differs in one prefill" if errors else "its parts were not compared"
        return Origin("graph", (), (), f"{gates}; {where}")
    detail = f"{gates}; {parts[0]} differs by {worst:.2g} (squared, relative) from the same weights in transformers"
    return Origin("graph", parts[:SHOWN], (), detail)


def _of_ladder(
    bundle_format: str, failed: Sequence[GateResult], stages: Sequence[Stage], layers: Sequence[Layer]
) -> Origin | None:
    """No tensor is out of its bound, but their sum is: the place is where putting the truth's part back helps most."""
    known = [stage for stage in stages if stage.share is not None and stage.chain == stages[0].chain]
    if not known or all(gate.pair in ("T-R", "R-O") or gate.gate.startswith("evidence.") for gate in failed):
        return None
    step = max(known, key=lambda stage: stage.share or 0.0).step
    storing = "rounding" if bundle_format == "float" else "quantization"
    helps = sorted(((layer.swap or 0.0, layer.part) for layer in layers), reverse=True)
    parts = tuple(part for share, part in helps if share > 0.25 * helps[0][0] > 0)
    gates = ", ".join(dict.fromkeys(gate.gate for gate in failed))
    detail = f"{gates}; {parts[0]} alone carries {helps[0][0]:.0%} of the KL to the truth" if parts else gates
    if step == "M32 -> F":
        return Origin(storing, parts[:SHOWN], (), detail)
    return Origin("graph" if step == "F -> O" else "merge", parts[:SHOWN] if step != "F -> O" else (), (), detail)


def _share(stages: Sequence[Stage], step: str) -> float:
    return next((stage.share or 0.0 for stage in stages if stage.step == step), 0.0)


def _is_finite_of_weights(failed: Sequence[GateResult]) -> bool:
    """NaN in F is a fault of the weights; O then has it too."""
    return any(gate.gate == "finite" and gate.pair == "M32-F" for gate in failed)
