"""Where an error comes from: each stage's share of the variance of the whole chain's log-probability error.

With e_i the log-probability differences along a chain T -> M32 -> F -> O and e their sum, KL(T||O) is about
Var_p(e) / 2, and Var_p(e) = sum_i Cov_p(e_i, e): share_i = sum_tokens Cov_p(e_i, e) / sum_tokens Var_p(e). The shares
of a chain sum to 1; a negative share is a stage that takes back part of another's error.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]


class Chain:
    """Adds up the covariances of one chain, document by document."""

    def __init__(self, name: str, models: Sequence[str]) -> None:
        self.name = name
        self.models = tuple(models)
        self._covariance = np.zeros(len(models) - 1)
        self._kl = np.zeros(len(models) - 1)
        self._tokens = 0

    @property
    def steps(self) -> list[str]:
        return [f"{a} -> {b}" for a, b in pairwise(self.models)]

    def add(self, log_p: Sequence[Float], p: Sequence[Float]) -> None:
        """log_p, p: one (N, V) per model of the chain, of the same tokens; p = exp(log_p)."""
        whole = log_p[-1] - log_p[0]
        whole -= np.einsum("nv,nv->n", p[0], whole)[:, None]
        whole *= p[0]
        for i in range(len(self.models) - 1):
            step = log_p[i + 1] - log_p[i]
            self._covariance[i] += np.einsum("nv,nv->", whole, step)
            self._kl[i] -= np.einsum("nv,nv->", p[i], step)
        self._tokens += len(whole)

    def include(self, other: "Chain") -> None:
        """Add what another chain of the same models has added up."""
        self._covariance += other._covariance
        self._kl += other._kl
        self._tokens += other._tokens

    def shares(self) -> list[float] | None:
        """One share per step; None where the chain's ends are equal."""
        total = self._covariance.sum()
        return [float(value) for value in self._covariance / total] if total > 0 else None

    def kl(self) -> list[float]:
        """Mean KL of each step on its own."""
        return [float(value) for value in self._kl / max(1, self._tokens)]
