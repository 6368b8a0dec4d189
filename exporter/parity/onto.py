"""Does a merge onto the base's int8 codes stand on them, or on the base's own weights?"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from exporter.graph.weights import Weight
from exporter.parity.elements import read_values
from exporter.parity.gates import ProjectionLimits
from exporter.parity.oracle import Oracle
from exporter.parity.result import Outcome
from exporter.sources.values import read_tensor


@dataclass(frozen=True, slots=True)
class OntoShare:
    """share: 0 for a merge onto the int8 codes, 1 for one onto the base's own weights; error: its standard error."""

    share: float
    error: float
    tensors: int

    def judge(self, limits: ProjectionLimits) -> Outcome:
        """As `judge_projection`, around 0."""
        if not self.error * limits.errors <= limits.blind:
            return "INCONCLUSIVE" if np.isfinite(self.share) else "FAIL"
        return "PASS" if abs(self.share) <= max(limits.share, limits.errors * self.error) else "FAIL"


def onto_share(weights: Mapping[str, Weight], oracle: Oracle, *, shifted: bool = False) -> OntoShare | None:
    """s = sum <What - W', q> / sum ||q||^2 over the weights that stand on int8 codes, with q = W - W_int8.

    W' is what the merge onto the codes must be, so that s is 0; a merge onto W itself leaves q standing. se from the
    residuals' mean squares. None where nothing stands on codes. shifted: of a bundle that is merged onto W.
    """
    numerator = denominator = variance = 0.0
    tensors = 0
    for name in oracle.int8_names:
        adapted = oracle.merge(name) if name in oracle.names else None
        if name not in weights or (adapted is not None and adapted.is_exact):
            continue
        onto = oracle.original(name).double().numpy()
        error = read_tensor(oracle.base_info(name)).double().numpy() - onto
        residual = read_values(weights[name]) - (onto if adapted is None else adapted.merged)
        if shifted:
            residual = residual + error
        square = float(np.vdot(error, error))
        numerator += float(np.vdot(residual, error))
        share = float(np.vdot(residual, error)) / square if square else 0.0
        denominator += square
        variance += float(np.mean((residual - share * error) ** 2)) * square
        tensors += 1
    if not denominator:
        return None
    return OntoShare(numerator / denominator, float(np.sqrt(variance)) / denominator, tensors)
