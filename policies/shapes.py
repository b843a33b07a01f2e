"""The best budgets of a shape: free, per layer, per head, per kind of head, within layers, layers times heads.

`shaped_budgets` reads curves that are known at some budgets and follows their hulls: fast, exact where curves are convex. `exact_budgets`
needs the curves at every whole number and finds the optimum of whatever curves; for `rank1`, which is not convex, what
`kvtool.policies.rankone` guarantees.

Shapes: L layers, H KV heads, N points of a curve.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from kvtool.errors import ConfigError
from kvtool.policies.choice import WORK, Choice, best_choice
from kvtool.policies.hull import Hull, lower_hull, water_fill
from kvtool.policies.rankone import CurveTable, best_rank_one

Float = NDArray[np.float64]
Int = NDArray[np.int64]
#: Names of the shapes, the tightest first.
BudgetShape = Literal["uniform", "layer", "head", "kinds", "within", "rank1", "free"]
SHAPES: tuple[BudgetShape, ...] = get_args(BudgetShape)
#: With more groups than these only the one that the hulls split is split.
MOST_SPLIT = 6


def group_of(shape: BudgetShape, n_layers: int, n_heads: int, kinds: Int | None = None) -> Int:
    """Return the group of each head, (L, H), numbered from 0; heads of a group get the same budget.

    Parameters
    ----------
    kinds : ndarray of shape (L, H), optional
        Number of each head's kind, for ``"kinds"``.

    Raises
    ------
    ConfigError
        ``"kinds"`` without kinds.
    """
    layer, head = np.indices((n_layers, n_heads))
    if shape == "uniform":
        return np.zeros((n_layers, n_heads), dtype=np.int64)
    if shape == "layer":
        return layer
    if shape == "head":
        return head
    if shape == "kinds":
        if kinds is None or kinds.shape != (n_layers, n_heads):
            raise ConfigError(f"budgets by kind of head need the kinds of {n_layers} x {n_heads} heads")
        return np.unique(kinds, return_inverse=True)[1].reshape(kinds.shape)
    return layer * n_heads + head


def shaped_budgets(entries: Int, harm: Float, total: int, shape: BudgetShape, kinds: Int | None = None) -> Int:
    """Return whole budgets that sum to `total`, (L, H), with little harm, from curves known at some budgets.

    Parameters
    ----------
    entries : ndarray of shape (N,)
        Budgets, rising, from the protected entries to the whole prompt.
    harm : ndarray of shape (N, L, H)
        Between these budgets linear.
    total : int
    shape : str
    kinds : ndarray of shape (L, H), optional

    Notes
    -----
    Where groups cannot meet the total with one whole number each, one group is split: some of its heads, those that gain most,
    get one entry more than the others.
    """
    n_layers, n_heads = harm.shape[1:]
    if shape == "within":
        # Every layer gets the same, to the entry as far as it goes.
        parts = np.full(n_layers, total // n_layers) + (np.arange(n_layers) < total % n_layers)
        return np.stack([water_fill(_hulls(entries, harm[:, i]), int(part)) for i, part in enumerate(parts)])
    if shape == "rank1":
        free = water_fill(_hulls(entries, harm.reshape(len(entries), -1)), total).reshape(n_layers, n_heads)
        simpler = tuple(shaped_budgets(entries, harm, total, name) for name in ("layer", "head"))
        return best_rank_one(CurveTable(entries, harm.transpose(1, 2, 0)), total, free, simpler)
    groups = group_of(shape, n_layers, n_heads, kinds)
    sizes = np.bincount(groups.ravel())
    hulls = [lower_hull(entries * size, harm[:, groups == group].sum(axis=1)) for group, size in enumerate(sizes.tolist())]
    return _spread(water_fill(hulls, total), groups, CurveTable(entries, harm.transpose(1, 2, 0)))


def _hulls(entries: Int, harm: Float) -> list[Hull]:
    return [lower_hull(entries, harm[:, k]) for k in range(harm.shape[1])]


def _spread(taken: Int, groups: Int, table: CurveTable) -> Int:
    """Give every head of a group the same part of what the group takes; what is left over to those that gain most."""
    sizes = np.bincount(groups.ravel())
    budgets = (taken // sizes)[groups]
    gain = (table.at(budgets) - table.at(np.minimum(budgets + 1, table.high))).ravel()
    for group, rest in enumerate((taken % sizes).tolist()):
        members = np.flatnonzero(groups.ravel() == group)
        more = members[np.argsort(-gain[members], kind="stable")[:rest]]
        budgets.ravel()[more] += 1
    return budgets


@dataclass(frozen=True, slots=True)
class ShapedChoice:
    """The best budgets of a shape.

    Attributes
    ----------
    budgets : ndarray of shape (L, H)
    harm : float
        Sum of the curves there.
    bound : float
        No budgets of the shape do less harm; for ``rank1`` the bound of ``free``, which is far from tight.
    proved : bool
        `budgets` are the best ones.
    """

    budgets: Int
    harm: float
    bound: float
    proved: bool


def exact_budgets(
    low: int,
    harm: Float,
    total: int,
    shape: BudgetShape,
    kinds: Int | None = None,
    *,
    known: tuple[Int, ...] = (),
    work: int = WORK,
) -> ShapedChoice:
    """Return the best whole budgets of a shape, (L, H), from curves at every whole number.

    Parameters
    ----------
    low : int
        Least budget of a head.
    harm : ndarray of shape (N, L, H)
        At budgets ``low, low + 1, ...``.
    total : int
    shape : str
        Groups that cannot meet the total are split as in `shaped_budgets`.
    kinds : ndarray of shape (L, H), optional
    known : tuple of ndarray of shape (L, H)
        Budgets of the shape from elsewhere; ``rank1`` is never worse than these.
    work : int
        See `kvtool.policies.choice.best_choice`.
    """
    n_points, n_layers, n_heads = harm.shape
    entries = np.arange(low, low + n_points)
    if shape == "within":
        parts = np.full(n_layers, total // n_layers) + (np.arange(n_layers) < total % n_layers)
        found = [
            best_choice([(entries, harm[:, i, h]) for h in range(n_heads)], int(part), work) for i, part in enumerate(parts)
        ]
        return ShapedChoice(
            np.stack([c.entries for c in found]),
            sum(c.value for c in found),
            sum(c.bound for c in found),
            all(c.proved for c in found),
        )
    if shape == "rank1":
        free = exact_budgets(low, harm, total, "free", work=work)
        simpler = tuple(exact_budgets(low, harm, total, name, work=work).budgets for name in ("layer", "head"))
        table = CurveTable(entries, harm.transpose(1, 2, 0))
        budgets = best_rank_one(table, total, free.budgets, (*simpler, *known))
        return ShapedChoice(budgets, float(table.sum(budgets)), free.bound, False)
    groups = group_of(shape, n_layers, n_heads, kinds)
    curves = [harm[:, groups == group] for group in range(int(groups.max()) + 1)]
    choice = _choose(entries, curves, total, work)
    budgets = _spread(choice.entries, groups, CurveTable(entries, harm.transpose(1, 2, 0)))
    return ShapedChoice(budgets, choice.value, choice.bound, choice.proved)


def _choose(entries: Int, curves: list[Float], total: int, work: int) -> Choice:
    """Choose what each group takes; curves (N, members) per group."""
    sizes = {curve.shape[1] for curve in curves}
    whole = [(entries * curve.shape[1], curve.sum(axis=1)) for curve in curves]
    if len(sizes) == 1 and total % next(iter(sizes)) == 0:
        return best_choice(whole, total, work)
    split: list[int] = list(range(len(curves)))
    if len(curves) > MOST_SPLIT:
        taken = water_fill([lower_hull(*unit) for unit in whole], total)
        split = [k for k in split if taken[k] % curves[k].shape[1]] or split[:1]
    found = [
        best_choice([_single(entries, curves[k]) if k == j else whole[k] for k in range(len(curves))], total, work)
        for j in split
    ]
    best = min(found, key=lambda choice: choice.value)
    return Choice(best.entries, best.value, min(c.bound for c in found), all(c.proved for c in found))


def _single(entries: Int, curve: Float) -> tuple[Int, Float]:
    """Return the curve of a group that may be split, entry by entry: some heads have one more, those that gain most first."""
    size = curve.shape[1]
    steps = np.sort(np.diff(curve, axis=0), axis=1)
    partial = np.concatenate([np.zeros((len(steps), 1)), np.cumsum(steps, axis=1)[:, :-1]], axis=1)
    values = np.append((curve[:-1].sum(axis=1, keepdims=True) + partial).ravel(), curve[-1].sum())
    return np.arange(int(entries[0]) * size, int(entries[-1]) * size + 1), values
