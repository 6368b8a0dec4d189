"""What a gate that did not pass means, and what to do about it: one sentence each, the same in every report."""

from exporter.parity.result import BundleResult, GateResult

FAILED = {
    "weights.projection": "The merge is wrong where named: wrong scale, wrong tensor, or merged twice. Merge again.",
    "weights.elements": "Stored values are not the rounded merge: the file was changed, or merged by another formula. "
    "Merge again.",
    "weights.untouched": "A weight that the adapter does not touch differs from the base. Merge again from this base.",
    "weights.step": "Quantized values are further off than the format rounds. Export again from the merged checkpoint.",
    "weights.names": "The bundle holds other tensors than this model: check that base and bundle belong together.",
    "weights.onto": "The merge stands on other base weights than its manifest says. Merge again, with --onto.",
    "peft-merge": "PEFT's own merge differs from the unmerged adapter: a fault of the libraries, not of the bundle. "
    "Report it.",
    "rounding": "Storing the weights in this type costs too much. Merge with a wider --dtype.",
    "graph": "The graph computes something else than its weights say. Export again; if it stays, report it.",
    "quality": "The graph is right, but quantization changes the answers too much. Use a wider precision.",
    "reference.sanity": "The 8-bit reference is far from the truth: check that base and adapter belong together.",
    "reference.excess": "The bundle is further from the 8-bit reference than the truth is. See which stage errs.",
    "liveness": "The bundle is no nearer to the adapted model than the base alone is: the adapter is not in it.",
    "cache": "Decoding with a cache gives other logits than one prefill. Export again; if it stays, report it.",
    "padding": "Padding changes the answers. Export again; if it stays, report it.",
    "finite": "NaN or infinity in the logits: half precision overflows, or a weight is damaged.",
    "evidence.distinct": "A model was compared with itself. Pass the merged bundle, not the base or the reference.",
    "evidence.apart": "The reference is the model it is compared with. Capture the unmerged 8-bit model.",
    "evidence.count": "Not every token was compared: report it.",
}
UNSURE_WEIGHTS = "This format rounds too coarsely to tell the adapter from nothing. Use a wider precision."
UNSURE = "The 95 % interval contains the limit, or there are too few tokens. Use a higher --level or more --prompts."
CAUSES = ("weights.", "peft-merge.", "finite", "evidence.")  # what they find makes other gates fail too
FOLLOWS = "Then verify again: the other gates can have failed because of this."
SURVIVED = "The check did not see a deliberate error, so this run proves nothing about such errors. Report it."


def advice(gate: GateResult) -> str:
    """What to do about a gate that did not pass; empty for one that did."""
    if gate.outcome == "INCONCLUSIVE":
        return UNSURE_WEIGHTS if gate.gate.startswith("weights.") else UNSURE
    if gate.outcome != "FAIL":
        return ""
    return FAILED.get(gate.gate) or FAILED.get(gate.gate.partition(".")[0], "")


def steps(bundle: BundleResult) -> list[str]:
    """All of a bundle's advice, each once, the worst gates first; of causes alone where there are any."""
    faulty = [gate for outcome in ("FAIL", "INCONCLUSIVE") for gate in bundle.gates if gate.outcome == outcome]
    causes = [gate for gate in faulty if gate.outcome == "FAIL" and gate.gate.startswith(CAUSES)]
    found = [advice(gate) for gate in causes or faulty]
    if causes and len(causes) < len(faulty):
        found.append(FOLLOWS)
    if any(mutant.outcome == "survived" for mutant in bundle.mutants):
        found.append(SURVIVED)
    return list(dict.fromkeys(filter(None, found)))
