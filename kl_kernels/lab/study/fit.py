"""Reward as a function of the distance from the reference, in the form of Gao et al. (2023).

"Scaling laws for reward model overoptimization", arXiv 2210.10760, for RL:

    R(d) = d (alpha - beta log d),    d = sqrt(KL(policy || reference)), R = 0 at the start
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import xlogy

from kl_kernels.lab.study.statistics import Array


@dataclass(frozen=True)
class GaoFit:
    """The form's constants; `beta` is the paper's, which is no KL penalty."""

    alpha: float
    beta: float
    r_squared: float

    def __call__(self, d: Array) -> Array:
        reward: Array = self.alpha * d - self.beta * xlogy(d, d)
        return reward

    @property
    def peak(self) -> float | None:
        """The d of the highest reward; None if there is none, or none below a KL of 1e8 nats."""
        log_d = self.alpha / self.beta - 1 if self.beta > 0 else math.inf
        return math.exp(log_d) if log_d < math.log(1e4) else None


def fit_gao(kl: Array, reward: Array) -> GaoFit:  # [N], [N]
    """Least squares; the form is linear in its constants.

    Raises:
        ValueError: fewer than three different KLs, which any constants would go through.
    """
    if len(np.unique(kl)) < 3:
        raise ValueError(f"kl has {len(np.unique(kl))} different values; a fit needs at least 3")
    d = np.sqrt(kl)
    terms = np.stack([d, -xlogy(d, d)], 1)
    (alpha, beta), *_ = np.linalg.lstsq(terms, reward, rcond=None)
    residual = ((reward - terms @ [alpha, beta]) ** 2).sum()
    total = ((reward - reward.mean()) ** 2).sum()
    return GaoFit(float(alpha), float(beta), float(1 - residual / total) if total else math.nan)
