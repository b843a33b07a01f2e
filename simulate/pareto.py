"""Pareto front of cost against harm."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def pareto_front(cost: NDArray[np.float64], harm: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which points no other point beats: none is at most as costly and at most as harmful, and better in one.

    Parameters
    ----------
    cost, harm : ndarray of shape (N,)
        Smaller is better in both. NaN points are never on the front.
    """
    front = np.zeros(len(cost), dtype=bool)
    known = np.flatnonzero(~(np.isnan(cost) | np.isnan(harm)))
    best, best_cost = np.inf, np.inf
    for index in known[np.lexsort((harm[known], cost[known]))]:
        if harm[index] < best:
            best, best_cost = float(harm[index]), float(cost[index])
            front[index] = True
        elif harm[index] == best and cost[index] == best_cost:
            front[index] = True
    return front
