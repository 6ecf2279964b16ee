"""Percentile bootstrap over rounds, each of which measured every contender once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RESAMPLES = 2000


def interval(
    rounds: Array,  # [n_rounds, ...]
    statistic: Callable[[Array], float],
    *,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the interval of `statistic` that holds `level` of the resampled sets of rounds.

    Rounds are drawn whole: what disturbs one disturbs all that it measured.
    """
    if len(rounds) < 2:
        raise ValueError(f"rounds has {len(rounds)}; a bootstrap needs at least 2")
    generator = np.random.default_rng(seed)
    drawn = generator.integers(len(rounds), size=(RESAMPLES, len(rounds)))
    found = np.array([statistic(rounds[indices]) for indices in drawn])
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
