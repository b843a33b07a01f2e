"""The best budgets for a total, from harm curves: convex hull of each head's curve, then water-filling.

Harm is a sum over heads (`kvtool.simulate.curves`), so heads can be traded against each other: entries go where the next
one saves the most harm. On the lower convex hulls that greedy choice is optimal (separable convex resource allocation).

Shapes: K heads (or layers, or any units that get a budget of their own), N points of a curve.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvtool.errors import ConfigError

Float = NDArray[np.float64]
Int = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Hull:
    """Lower convex hull of one unit's curve.

    Attributes
    ----------
    entries : ndarray of shape (V,)
        Budgets of the vertices, rising.
    harm : ndarray of shape (V,)
        Harm at the vertices.
    """

    entries: Int
    harm: Float

    def at(self, entries: float) -> float:
        """Return the hull's harm at a budget, linear between vertices."""
        return float(np.interp(entries, self.entries, self.harm))


def lower_hull(entries: Int, harm: Float) -> Hull:
    """Return the lower convex hull of a curve.

    Parameters
    ----------
    entries : ndarray of shape (N,)
        Budgets, rising.
    harm : ndarray of shape (N,)
    """
    x, y = entries.tolist(), harm.tolist()
    kept: list[int] = []
    for i in range(len(x)):
        # The last vertex goes as long as it lies on or above the line from the one before it to the new point.
        while len(kept) > 1 and _slope(x, y, kept[-2], kept[-1]) >= _slope(x, y, kept[-1], i):
            kept.pop()
        kept.append(i)
    return Hull(entries[kept], harm[kept])


def _slope(x: list[float], y: list[float], i: int, j: int) -> float:
    return (y[j] - y[i]) / (x[j] - x[i])


def water_fill(hulls: list[Hull], total: int, cost: Int | None = None) -> Int:
    """Share `total` entries so that the sum of the hulls' harms is smallest.

    Parameters
    ----------
    hulls : list of K Hull
        Each from its own least to its own largest budget.
    total : int
        Entries to share, exactly.
    cost : ndarray of shape (K,), optional
        Entries of the total that one entry of a unit's budget takes: the KV heads of a layer, where a layer is the unit. Every
        unit must take the same, for the total to be exact.

    Returns
    -------
    ndarray of shape (K,)
        Budgets; they sum to ``total / cost``.

    Raises
    ------
    ConfigError
        The total lies outside what the curves cover, or is no multiple of the cost.
    """
    if cost is not None:
        if len(set(cost.tolist())) != 1 or total % int(cost[0]):
            raise ConfigError(f"{total} entries cannot be shared among units of {sorted(set(cost.tolist()))} entries each")
        total //= int(cost[0])
    budgets = np.asarray([hull.entries[0] for hull in hulls], dtype=np.int64)
    most = sum(int(hull.entries[-1]) for hull in hulls)
    if not int(budgets.sum()) <= total <= most:
        raise ConfigError(f"{total} entries: the curves cover {int(budgets.sum())} to {most}")
    unit, step, slope = [], [], []
    for k, hull in enumerate(hulls):
        lengths = np.diff(hull.entries)
        unit += [k] * len(lengths)
        step += lengths.tolist()
        slope += (np.diff(hull.harm) / lengths).tolist()
    left = total - int(budgets.sum())
    # A hull's slopes rise, so taking segments by slope takes each unit's in order; equal slopes: the earlier unit first.
    for i in np.argsort(np.asarray(slope), kind="stable"):
        taken = min(left, step[i])
        budgets[unit[i]] += taken
        left -= taken
        if not left:
            break
    return budgets


def rank_one(budgets: Float, low: float) -> Float:
    """Return the layer-times-head shape that is closest to `budgets` above `low`, (L, H), with the same total.

    The product of the marginals: of all products of a layer factor and a head factor it has the smallest Kullback-Leibler
    divergence from the given shares. This is HACE's shape with factors that are fitted instead of measured.
    """
    free = np.maximum(np.asarray(budgets, dtype=np.float64) - low, 0.0)
    total = free.sum()
    if total <= 0:
        return np.asarray(budgets, dtype=np.float64)
    product: Float = low + np.outer(free.sum(1), free.sum(0)) / total
    return product
