"""Logarithms of the model's own probabilities, before penalties and temperature."""

import numpy as np


def logprobs(logits: np.ndarray, id: int, top: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Of token `id` and of the `top` likeliest, best first and the lower id first among equals, from logits (V,)."""
    shifted = logits.astype(np.float64) - logits.max()
    shifted -= np.log(np.exp(shifted).sum())
    top = min(top, len(shifted))
    if top == 0:
        return float(shifted[id]), ()
    least = np.partition(shifted, -top)[-top]
    likely = np.flatnonzero(shifted >= least)
    best = likely[np.argsort(-shifted[likely], kind="stable")][:top]
    return float(shifted[id]), tuple((int(one), float(shifted[one])) for one in best)
