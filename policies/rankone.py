"""Budgets that are a factor per layer times a factor per head above a floor, with the least harm: HACE's shape, its factors fitted.

The budgets are ``min(T, floor + a_l b_h)``. For given head factors and floor the best layer factors are a water-filling problem, and the
other way round; steps of the two kinds and over the floor alternate from several starts. The problem is not convex, so the result is a good
shape and no proven optimum; `best_rank_one` says what it guarantees.

Shapes: L layers, H KV heads, N points of a curve, T prompt positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvtool.policies.hull import lower_hull, rank_one
from kvtool.policies.shares import share

Float = NDArray[np.float64]
Int = NDArray[np.int64]

#: Factors that a step tries for each layer or head.
FACTORS = 96
#: Floors that a step tries, as shares of what the budget leaves beside the protected entries.
FLOORS = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7)
#: Rounds of alternation at most; few are needed.
ROUNDS = 12


@dataclass(frozen=True, slots=True)
class CurveTable:
    """Harm curves of all heads on one grid, linear between its points.

    Attributes
    ----------
    entries : ndarray of shape (N,)
        Budgets, rising, from the protected entries to T.
    harm : ndarray of shape (L, H, N)
    """

    entries: Int
    harm: Float

    @property
    def low(self) -> int:
        return int(self.entries[0])

    @property
    def high(self) -> int:
        return int(self.entries[-1])

    def at(self, budgets: NDArray[np.generic]) -> Float:
        """Return the harm of each head, (..., L, H), at budgets of that shape."""
        wanted = np.asarray(budgets, dtype=np.float64)
        right = np.clip(np.searchsorted(self.entries, wanted, side="left"), 1, len(self.entries) - 1)
        left = right - 1
        part = (wanted - self.entries[left]) / (self.entries[right] - self.entries[left])
        layer, head = np.ogrid[: self.harm.shape[0], : self.harm.shape[1]]
        below, above = self.harm[layer, head, left], self.harm[layer, head, right]
        found: Float = below + part * (above - below)
        return found

    def sum(self, budgets: NDArray[np.generic]) -> Float:
        """Return the harm of all heads together, (...,)."""
        return self.at(budgets).sum(axis=(-2, -1))  # type: ignore[no-any-return]

    def transposed(self) -> CurveTable:
        """Return the table with layers and heads exchanged."""
        return CurveTable(self.entries, self.harm.transpose(1, 0, 2))


@dataclass(frozen=True, slots=True)
class Factors:
    """One shape: ``min(T, floor + layers_l heads_h)``."""

    layers: Float
    heads: Float
    floor: int

    def whole(self, total: int, high: int) -> Int:
        """Return whole budgets with that sum, (L, H), as HACE rounds them."""
        weights = np.outer(self.layers, self.heads)
        flat = share(total, weights.flatten().tolist(), self.floor, high)
        return np.asarray(flat, dtype=np.int64).reshape(weights.shape)


def best_rank_one(table: CurveTable, total: int, free: Int, others: tuple[Int, ...] = ()) -> Int:
    """Return budgets of the shape with little harm, (L, H).

    Parameters
    ----------
    table : CurveTable
    total : int
        Sum of the budgets.
    free : ndarray of shape (L, H)
        The best budgets without a shape, where the search starts.
    others : tuple of ndarray of shape (L, H)
        Budgets of this shape that are known already (the best by layer, say).

    Returns
    -------
    ndarray of int64
        Whole numbers that sum to `total`, the shape rounded as HACE rounds it. Their harm by the table is at most that of the
        product of the marginals of `free` (`kvtool.policies.hull.rank_one`), of an even share, and of each of `others`.
    """
    marginals = rank_one(free.astype(np.float64), table.low) - table.low
    known = [np.asarray(share(total, marginals.flatten().tolist(), table.low, table.high)).reshape(free.shape)]
    known.append(np.asarray(share(total, [1.0] * free.size, table.low, table.high)).reshape(free.shape))
    found = [(_relaxed(table, factors, total), factors) for factors in _starts(free, table.low)]
    found = [_alternate(table, harm, factors, total) for harm, factors in found]
    found.sort(key=lambda item: item[0])
    known += [factors.whole(total, table.high) for _, factors in found]
    known += [_polished(table, factors, total).whole(total, table.high) for _, factors in found[:2]]
    candidates = [*known, *others]
    return candidates[int(np.argmin([float(table.sum(budgets)) for budgets in candidates]))]


def _starts(free: Int, low: int) -> list[Factors]:
    """Return where the search starts: margins of the best free budgets, plain and sharpened, crosses through its largest heads."""
    above = np.maximum(free - low, 0).astype(np.float64) + 1e-3
    pairs = [(above.sum(1) ** power, above.sum(0) ** power) for power in (1.0, 2.0, 4.0)]
    # The product that is closest in the logarithm, where the marginals are closest in the entries.
    pairs.append((np.exp(np.log(above).mean(1)), np.exp(np.log(above).mean(0))))
    for flat in np.argsort(-above, axis=None, kind="stable")[:3]:
        layer, head = np.unravel_index(flat, above.shape)
        pairs.append((above[:, head].copy(), above[layer].copy()))
    pairs.append((above.sum(1), np.ones(above.shape[1])))
    pairs.append((np.ones(above.shape[0]), above.sum(0)))
    rng = np.random.default_rng(0)
    pairs += [(np.exp(rng.normal(0, 2, above.shape[0])), np.exp(rng.normal(0, 2, above.shape[1]))) for _ in range(3)]
    return [Factors(layers / layers.max(), heads / heads.max(), low) for layers, heads in pairs]


def scaled(weights: Float, floor: float, total: float, high: float) -> Float:
    """Return ``min(high, floor + s weights)`` with the s that gives the sum `total`, (..., L, H).

    Where weights of 0 leave entries over, all get as much more.
    """
    shape = weights.shape
    flat = weights.reshape(-1, shape[-2] * shape[-1])
    n, room, left = flat.shape[1], high - floor, total - floor * shape[-2] * shape[-1]
    falling = -np.sort(-flat, axis=1)
    rest = falling.sum(axis=1, keepdims=True) - np.concatenate(
        [np.zeros((len(flat), 1)), falling.cumsum(axis=1)[:, :-1]], axis=1
    )
    # With the j largest full, the others share what is left; the right j is the first that fills no further one.
    scale = (left - np.arange(n) * room) / np.where(rest > 0, rest, np.inf)
    fits = scale * falling <= room * (1 + 1e-12)
    chosen = np.where(fits.any(axis=1), fits.argmax(axis=1), n - 1)
    parts = np.minimum(room, scale[np.arange(len(flat)), chosen][:, None] * flat)
    missing = (left - parts.sum(axis=1, keepdims=True)) / n
    found: Float = np.minimum(high, floor + parts + missing).reshape(shape)
    return found


def _relaxed(table: CurveTable, factors: Factors, total: int) -> float:
    weights = np.outer(factors.layers, factors.heads)
    return float(table.sum(scaled(weights, factors.floor, total, table.high)))


def _alternate(table: CurveTable, harm: float, factors: Factors, total: int) -> tuple[float, Factors]:
    """Improve layer factors, head factors and the floor in turn, as long as the harm falls."""
    for _ in range(ROUNDS):
        before = harm
        layers = _side(table, factors.layers, factors.heads, factors.floor, total)
        harm, factors = _better(table, harm, factors, Factors(layers, factors.heads, factors.floor), total)
        heads = _side(table.transposed(), factors.heads, factors.layers, factors.floor, total)
        harm, factors = _better(table, harm, factors, Factors(factors.layers, heads, factors.floor), total)
        spare = total / factors.layers.size / factors.heads.size - table.low
        for part in FLOORS:
            floored = Factors(factors.layers, factors.heads, table.low + int(part * spare))
            harm, factors = _better(table, harm, factors, floored, total)
        if harm > before - 1e-6 * abs(before):
            break
    return harm, factors


def _better(table: CurveTable, harm: float, factors: Factors, other: Factors, total: int) -> tuple[float, Factors]:
    if not other.layers.max() > 0 or not other.heads.max() > 0:
        return harm, factors
    found = _relaxed(table, other, total)
    return (found, other) if found < harm else (harm, factors)


def _side(table: CurveTable, own: Float, other: Float, floor: int, total: int) -> Float:
    """Return the best factors of the layers for given ones of the heads, each scaled to a maximum of 1 on return.

    A layer with factor x takes ``sum_h min(T, floor + x b_h)`` entries and does a harm that follows; on the hulls of these
    curves entries go where they save most.
    """
    b = other / other.max()
    least = b[b > 0].min()
    room = table.high - floor
    top = room / max(least, 1e-3)
    scale = (total / own.size / b.size - floor + 1.0) / max(own.mean() * b.mean(), 1e-12)
    tried = np.concatenate([[0.0], np.geomspace(top * 1e-5, top, FACTORS), np.minimum(own * scale, top)])
    tried = np.unique(tried)
    budgets = np.minimum(table.high, floor + tried[:, None] * b[None, :])
    taken = budgets.sum(axis=1)
    harm = table.at(np.broadcast_to(budgets[:, None, :], (len(tried), own.size, b.size))).sum(axis=2)
    taken, first = np.unique(taken, return_index=True)
    tried, harm = tried[first], harm[first]
    hulls = [lower_hull(taken, harm[:, layer]) for layer in range(own.size)]
    lengths = np.concatenate([np.diff(hull.entries) for hull in hulls])
    slopes = np.concatenate([np.diff(hull.harm) for hull in hulls]) / lengths
    unit = np.repeat(np.arange(own.size), [len(hull.entries) - 1 for hull in hulls])
    order = np.argsort(slopes, kind="stable")
    filled = np.clip(total - own.size * taken[0] - np.concatenate([[0.0], np.cumsum(lengths[order])[:-1]]), 0.0, lengths[order])
    entries = taken[0] + np.bincount(unit[order], weights=filled, minlength=own.size)
    factors: Float = np.interp(entries, taken, tried)
    return factors / factors.max() if factors.max() > 0 else own


def _polished(table: CurveTable, factors: Factors, total: int) -> Factors:
    """Move single factors up and down by shrinking steps, as long as the harm falls."""
    n_layers = len(factors.layers)
    point = np.concatenate([factors.layers, factors.heads])
    harm, step = _relaxed(table, factors, total), 2.0
    moves = np.eye(len(point))
    while step > 1.02:
        tried = np.concatenate([point * step**moves, point * step**-moves])
        weights = tried[:, :n_layers, None] * tried[:, None, n_layers:]
        harms = table.sum(scaled(weights, factors.floor, total, table.high))
        best = int(np.argmin(harms))
        if harms[best] < harm - 1e-9 * abs(harm):
            harm, point = float(harms[best]), tried[best]
        else:
            step = step**0.5
    return Factors(point[:n_layers], point[n_layers:], factors.floor)
