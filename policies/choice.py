"""The best whole-number budgets for a total under any curves, convex or not: a knapsack with one choice per unit, solved exactly.

`kvtool.policies.hull` is exact where curves are convex. Where they are not, one unit rests inside a segment of its hull, and its curve can
lie far above it. Here the Lagrangian bound says how far from the optimum a choice can be at most, and dynamic programming over the points
that can still be part of the optimum closes the rest.

Shapes: K units (heads, or groups of heads with one budget), M points of a curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvtool.errors import ConfigError

Float = NDArray[np.float64]
Int = NDArray[np.int64]

#: Elementary steps of the dynamic programme, after which the best choice so far stands, with its bound.
WORK = 200_000_000
#: A choice this close to the bound, relative to the curves' heights, is the best.
CLOSE = 1e-12


@dataclass(frozen=True, slots=True)
class Choice:
    """What every unit gets.

    Attributes
    ----------
    entries : ndarray of shape (K,)
        Sums to the total.
    value : float
        Sum of the curves there.
    bound : float
        No choice with the same total has a smaller sum.
    proved : bool
        The choice is the best one, up to rounding.
    """

    entries: Int
    value: float
    bound: float
    proved: bool


def best_choice(units: Sequence[tuple[Int, Float]], total: int, work: int = WORK) -> Choice:
    """Choose one point of every curve so that the entries sum to `total` and the values to the least.

    Parameters
    ----------
    units : sequence of K pairs of ndarray of shape (M,)
        Entries that a unit may get, rising, and the value of each. Lengths may differ.
    total : int
    work : int
        Steps to spend on the proof.

    Raises
    ------
    ConfigError
        The total lies outside what the units can hold, or no choice was found that meets it exactly.
    """
    least, most = (sum(int(entries[i]) for entries, _ in units) for i in (0, -1))
    if not least <= total <= most:
        raise ConfigError(f"{total} entries: the curves cover {least} to {most}")
    price = _price(units, total)
    reduced, bound = [], -price * total
    for entries, values in units:
        cost = values + price * entries
        reduced.append(cost - cost.min())
        bound += float(cost.min())
    close = CLOSE * max(1.0, sum(float(np.abs(values).max()) for _, values in units))
    index = _greedy(units, reduced, total)
    found = None if index is None else _value(units, index)
    excess = np.inf if found is None else found - bound
    reach = max(close, min(excess, max(float(r.max()) for r in reduced)) / 64)
    while excess > close:
        # Every choice whose parts exceed the bound by no more than `reach` together is looked at, so the best of them is the best of all.
        reach = min(reach, excess)
        better, spent = _within(units, reduced, total, reach, work)
        work -= spent
        if better is not None:
            index, excess = better, _value(units, better) - bound
            break
        if reach >= excess or work <= 0 or reach >= sum(float(r.max()) for r in reduced):
            break
        reach *= 4
    if index is None:
        raise ConfigError(f"{total} entries cannot be shared exactly among these units")
    value = _value(units, index)
    proved = work > 0 or excess <= close
    entries = np.asarray([entries[i] for (entries, _), i in zip(units, index, strict=True)], dtype=np.int64)
    return Choice(entries, value, value if proved else bound, proved)


def _value(units: Sequence[tuple[Int, Float]], index: Sequence[int]) -> float:
    return float(sum(values[i] for (_, values), i in zip(units, index, strict=True)))


def _price(units: Sequence[tuple[Int, Float]], total: int) -> float:
    """Return what an entry is worth where the total is met: the maximum of the Lagrangian bound, by bisection."""

    def wanted(price: float) -> int:
        return sum(int(entries[np.argmin(values + price * entries)]) for entries, values in units)

    steepest = max(float(np.max(np.abs(np.diff(values) / np.diff(entries)), initial=0.0)) for entries, values in units)
    low, high = -steepest - 1.0, steepest + 1.0
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        asked = wanted(middle)
        if asked == total:
            return middle
        low, high = (middle, high) if asked > total else (low, middle)
    return high


def _greedy(units: Sequence[tuple[Int, Float]], reduced: Sequence[Float], total: int) -> list[int] | None:
    """Return a choice that meets the total, if this finds one: each unit's best, then the rest to the cheapest."""
    index = [int(np.argmin(cost)) for cost in reduced]
    left = total - sum(int(entries[i]) for (entries, _), i in zip(units, index, strict=True))
    for _ in range(2 * len(units)):
        if not left:
            return index
        best, cheapest = None, np.inf
        for k, (entries, _) in enumerate(units):
            to = int(np.searchsorted(entries, entries[index[k]] + left, side="right" if left > 0 else "left"))
            to = to - 1 if left > 0 else min(to, len(entries) - 1)
            moved = int(entries[to] - entries[index[k]])
            if moved and abs(left - moved) < abs(left):
                # Per entry, so that a unit that can take all of it is not put behind one that takes a little.
                cost = float(reduced[k][to] - reduced[k][index[k]]) / abs(moved)
                if cost < cheapest:
                    best, cheapest = (k, to, moved), cost
        if best is None:
            return None
        index[best[0]], left = best[1], left - best[2]
    return None if left else index


def _within(
    units: Sequence[tuple[Int, Float]], reduced: Sequence[Float], total: int, reach: float, work: int
) -> tuple[list[int] | None, int]:
    """Return the best choice whose reduced costs sum to at most `reach`, and the steps taken; None where there is none."""
    points = [np.flatnonzero(cost <= reach) for cost in reduced]
    spans = [(int(entries[p[0]]), int(entries[p[-1]])) for (entries, _), p in zip(units, points, strict=True)]
    # Sums that the units to come can still complete.
    lows = np.concatenate([np.cumsum([low for low, _ in spans[::-1]])[::-1], [0]])
    highs = np.concatenate([np.cumsum([high for _, high in spans[::-1]])[::-1], [0]])
    if not lows[0] <= total <= highs[0]:
        return None, 0
    start, sums = 0, np.zeros(1)
    tables: list[tuple[int, NDArray[np.int32]]] = []
    spent = 0
    for k, ((entries, _), chosen) in enumerate(zip(units, points, strict=True)):
        first = max(start + spans[k][0], total - int(highs[k + 1]))
        last = min(start + len(sums) - 1 + spans[k][1], total - int(lows[k + 1]))
        spent += len(chosen) * len(sums)
        if last < first or spent > work:
            return None, spent
        after = np.full(last - first + 1, np.inf)
        taken = np.full(last - first + 1, -1, dtype=np.int32)
        for i in chosen.tolist():
            # Sums start + j become start + j + entries[i]; only those inside first ... last count.
            at = start + int(entries[i]) - first
            a, b = max(0, -at), min(len(sums), len(after) - at)
            if a >= b:
                continue
            cost = sums[a:b] + reduced[k][i]
            place = slice(at + a, at + b)
            better = cost < after[place]
            after[place][better] = cost[better]
            taken[place][better] = i
        after[after > reach * (1 + 1e-9)] = np.inf
        if not np.isfinite(after).any():
            return None, spent
        tables.append((first, taken))
        start, sums = first, after
    if not np.isfinite(sums[total - start]):
        return None, spent
    return _trace(units, tables, total), spent


def _trace(units: Sequence[tuple[Int, Float]], tables: Sequence[tuple[int, NDArray[np.int32]]], total: int) -> list[int]:
    """Walk back from the total to every unit's point."""
    index = [0] * len(units)
    for k in range(len(units) - 1, -1, -1):
        first, taken = tables[k]
        index[k] = int(taken[total - first])
        total -= int(units[k][0][index[k]])
    return index
