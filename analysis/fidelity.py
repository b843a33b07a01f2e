"""How well the offline ranking agrees with reality, measured like an instrument.

For every prompt length and budget the configurations are ranked by a predictor and by what really happened; Kendall's tau-b
compares both orders, and the mean over budgets is reported: a tau over all budgets together would be inflated, as the budget
alone explains most of it. Shapes: N configurations of a budget, S samples, D draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvtool.analysis.cells import PREDICTORS, Cell
from kvtool.analysis.load import Float
from kvtool.analysis.statistics import TIE, Interval, nan_mean, percentile_interval, tau_b
from kvtool.bootstrap import bootstrap_weights
from kvtool.errors import DataError

#: tops whose regret and recall are reported
TOPS = (1, 3, 16)
#: Friedman's test must reject "all configurations do equally well" at this level for a budget to have an order
ORDER_LEVEL = 0.01
#: random halves of the samples for the ceiling, and as many for each of its draws
SPLITS, SPLITS_PER_DRAW = 200, 8
#: orders in which ties of a predictor are broken for a point estimate
TIE_ORDERS = 256


@dataclass(frozen=True, slots=True)
class CellAgreement:
    """Agreement in one cell.

    Attributes
    ----------
    length : int or None
        Prompt length.
    budget : str
    n_policies : int
    tau : dict of str to Interval
        Per predictor of the cell.
    ceiling : float
    """

    length: int | None
    budget: str
    n_policies: int
    tau: dict[str, Interval]
    ceiling: float
    task: str | None = None
    compress_at: str | None = None


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement of the predictors with one real figure, means over cells.

    Attributes
    ----------
    truth : str
    n_cells : int
        Cells that count: those whose configurations differ in reality by more than the noise of the prompts.
    n_tied : int
        Cells left out because all configurations do exactly equally well.
    n_noise : int
        Cells left out because Friedman's test does not tell their configurations apart (`ORDER_LEVEL`).
    ceiling : Interval
        Mean tau between random halves of the real samples: how far reality agrees with itself on half the samples.
    perfect : float
        Mean tau that a perfect predictor would reach on all samples, extrapolated from the halves, see `perfect_tau`.
    tau : dict of str to Interval
        Per predictor.
    n_cells_of : dict of str to int
        Cells per predictor; refined figures exist only where all configurations of a budget were refined.
    advantage : dict of str to Interval
        Per predictor: its tau minus that of attention recall, same cells and draws.
    resolved : dict of str to Interval
        Per predictor: of the pairs of configurations that reality can tell apart, the share that is ordered right; ties count half.
    n_resolved : int
        Such pairs.
    regret : dict of str to dict of str to Interval
        Per predictor and top k: best real value minus the best among the predicted top k.
    as_good : dict of str to dict of str to float
        Per predictor and top k: share of the cells whose predicted top k holds a configuration that is not distinguishable from
        the best one.
    tied_best_recall : dict of str to dict of str to Interval
        Per predictor and top k: share of the configurations statistically tied with the best that are in the top k; with
        more than k of them, share of k.
    cells : tuple of CellAgreement
    """

    truth: str
    n_cells: int
    n_tied: int
    n_noise: int
    ceiling: Interval
    perfect: float
    tau: dict[str, Interval]
    n_cells_of: dict[str, int]
    advantage: dict[str, Interval]
    resolved: dict[str, Interval]
    n_resolved: int
    regret: dict[str, dict[str, Interval]]
    as_good: dict[str, dict[str, float]]
    tied_best_recall: dict[str, dict[str, Interval]]
    cells: tuple[CellAgreement, ...]


@dataclass(frozen=True, slots=True)
class _Measured:
    """Figures of one predictor in one cell; entry 0 is the point estimate, the others are the draws, shape (1 + D,).

    `right` has shape (1 + D, pairs that reality can tell apart): 1 ordered right, 0 wrong, a half for a tie.
    """

    tau: Float
    regret: dict[int, Float]
    recall: dict[int, Float]
    as_good: dict[int, float]
    right: Float


def measure_agreement(cells: Sequence[Cell], truth: str, draws: int, seed: int, order_level: float = ORDER_LEVEL) -> Agreement:
    """Measure tau, regret and recall over all cells, with intervals from resampled prompts.

    Parameters
    ----------
    cells : sequence of Cell
    truth : str
        Key of `kvtool.analysis.cells.TRUTHS`.
    draws, seed : int
    order_level : float
        Level of the test that tells an order from noise; 1 counts every cell that is not exactly tied.

    Raises
    ------
    DataError
        In no cell do the configurations differ in reality.
    """
    having = [cell for cell in cells if truth in cell.real]
    untied = [cell for cell in having if np.ptp(cell.real[truth].mean(1)) > TIE]
    ordered = [cell for cell in untied if order_level >= 1 or order_p_value(cell.real[truth]) < order_level]
    if not ordered:
        raise DataError(
            f"all configurations do equally well by {truth!r} in reality, or differ by no more than prompts do by chance: "
            "there is no order to predict"
        )
    rng, tie_rng = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    drawn_weights = _draw_weights(ordered, truth, draws, rng)
    ceilings = [_ceiling(cell.real[truth], w, rng) for cell, (_, w) in zip(ordered, drawn_weights, strict=True)]
    measured = [_measure(cell, truth, w, tie_rng) for cell, w in zip(ordered, drawn_weights, strict=True)]
    names = [name for name in PREDICTORS if any(name in found for found in measured)]
    of = {name: [found[name] for found in measured if name in found] for name in names}
    taus = {name: nan_mean(np.stack([m.tau for m in of[name]])) for name in names}
    return Agreement(
        truth=truth,
        n_cells=len(ordered),
        n_tied=len(having) - len(untied),
        n_noise=len(untied) - len(ordered),
        ceiling=_interval(nan_mean(np.stack(ceilings))),
        perfect=float(nan_mean(np.asarray([perfect_tau(float(top[0])) for top in ceilings]))),
        tau={name: _interval(taus[name]) for name in names},
        n_cells_of={name: len(of[name]) for name in names},
        advantage={name: _interval(_over_recall(measured, name)) for name in names if name != "recall"},
        resolved={name: _interval(_share_right(of[name])) for name in names},
        n_resolved=sum(next(iter(found.values())).right.shape[1] for found in measured),
        regret={n: {f"top{k}": _interval(nan_mean(np.stack([m.regret[k] for m in of[n]]))) for k in TOPS} for n in names},
        as_good={n: {f"top{k}": float(np.mean([m.as_good[k] for m in of[n]])) for k in TOPS} for n in names},
        tied_best_recall={
            n: {f"top{k}": _interval(nan_mean(np.stack([m.recall[k] for m in of[n]]))) for k in TOPS} for n in names
        },
        cells=tuple(
            CellAgreement(
                c.length,
                c.budget,
                len(c.policies),
                {n: _interval(v.tau) for n, v in m.items()},
                float(top[0]),
                c.task,
                c.compress_at,
            )
            for c, m, top in zip(ordered, measured, ceilings, strict=True)
        ),
    )


def order_p_value(real: Float) -> float:
    """Return Friedman's p-value of "all N configurations do equally well" over S samples as blocks, real of shape (N, S).

    Friedman 1937: ranks within a sample, so that hard samples do not count more than easy ones.
    """
    from scipy.stats import friedmanchisquare

    # Samples on which all do equally well say nothing; without any other there is no order.
    informative = real[:, np.ptp(real, axis=0) > TIE]
    if informative.shape[1] < 2:
        return 1.0
    return float(friedmanchisquare(*informative).pvalue)


def perfect_tau(half: float) -> float:
    """Return the tau of the true order with that of all samples, from the tau of the orders of two halves.

    Greiner's relation turns tau into a correlation (``sin(pi tau / 2)``, exact for normal variables), the Spearman-Brown formula
    extends it from half to all samples, and its root is the correlation of the truth with what all samples show.
    """
    r = float(np.sin(np.pi / 2 * half))
    if r <= 0:
        return 0.0
    return float(2 / np.pi * np.arcsin(np.sqrt(2 * r / (1 + r))))


def _over_recall(measured: Sequence[dict[str, _Measured]], name: str) -> Float:
    """Mean difference of tau from attention recall's over the cells that have the predictor."""
    return nan_mean(np.stack([found[name].tau - found["recall"].tau for found in measured if name in found]))


def _share_right(found: Sequence[_Measured]) -> Float:
    """Share of right pairs over all cells together: cells count by how many pairs reality can tell apart in them."""
    rights = [m.right for m in found if m.right.shape[1]]
    return np.concatenate(rights, axis=1).mean(axis=1) if rights else np.full(2, np.nan)


def _resolved_pairs(real: Float, real_weights: Float) -> tuple[NDArray[np.int64], NDArray[np.int64], Float]:
    """Return the pairs of configurations whose paired difference has an interval without 0, and its sign."""
    first, second = np.triu_indices(len(real), k=1)
    difference = real[first] - real[second]
    low, high = np.quantile(difference @ real_weights.T, [0.025, 0.975], axis=1)
    apart = (low > TIE) | (high < -TIE)
    return first[apart], second[apart], np.sign(difference[apart].mean(1))


def _interval(values: Float) -> Interval:
    return percentile_interval(float(values[0]), values[1:])


def _measure(cell: Cell, truth: str, drawn: tuple[Float, Float], rng: np.random.Generator) -> dict[str, _Measured]:
    """Compare every predictor of a cell with one real figure."""
    sim_weights, real_weights = drawn
    real = cell.real[truth]
    real_draws = np.column_stack([real.mean(1), real @ real_weights.T])
    has_order = np.ptp(real_draws, axis=0) > TIE
    tied = _tied_with_best(real, real_weights)
    first, second, sign = _resolved_pairs(real, real_weights)
    found = {}
    for name, predicted in cell.predicted.items():
        predicted_draws = np.column_stack([predicted.mean(1), predicted @ sim_weights.T])
        tau = tau_b(predicted_draws, real_draws)
        # A predictor without any order says nothing: tau 0. Where reality has no order, tau stays undefined for all.
        tau[has_order & np.isnan(tau)] = 0.0
        regret, recall, as_good = _tops(predicted_draws, real_draws, tied, rng)
        gap = predicted_draws[first] - predicted_draws[second]
        right = (1 + np.where(np.abs(gap) < TIE, 0.0, np.sign(gap)) * sign[:, None]) / 2
        found[name] = _Measured(tau, regret, recall, as_good, right.T)
    return found


def _tops(
    predicted: Float, real: Float, tied: set[int], rng: np.random.Generator
) -> tuple[dict[int, Float], dict[int, Float], dict[int, float]]:
    """Return regret and recall of the predicted tops, per k of shape (1 + D,), and whether one in them is as good as the best.

    Ties of the predictor are broken at random, not by the order in the file: one order per draw, the mean over
    `TIE_ORDERS` of them for the point estimate.
    """
    predicted = np.column_stack([np.repeat(predicted[:, :1], TIE_ORDERS, axis=1), predicted[:, 1:]])
    real = np.column_stack([np.repeat(real[:, :1], TIE_ORDERS, axis=1), real[:, 1:]])
    ranks = np.lexsort((rng.random(predicted.shape), -np.round(predicted / TIE) * TIE), axis=0)
    is_tied = np.isin(ranks, sorted(tied))
    regret, recall, as_good = {}, {}, {}
    for k in TOPS:
        lost = real.max(0) - np.take_along_axis(real, ranks[:k], axis=0).max(0)
        hits = is_tied[:k].sum(0) / min(k, len(tied))
        regret[k], recall[k] = (np.concatenate([[v[:TIE_ORDERS].mean()], v[TIE_ORDERS:]]) for v in (lost, hits))
        as_good[k] = float((is_tied[:k, :TIE_ORDERS].sum(0) > 0).mean())
    return regret, recall, as_good


def _draw_weights(cells: Sequence[Cell], truth: str, draws: int, rng: np.random.Generator) -> list[tuple[Float, Float]]:
    """One resampling of prompts per pair of folders, shared by its budgets and, where paired, by prediction and reality."""
    drawn: dict[tuple[object, ...], tuple[Float, Float]] = {}
    result = []
    for cell in cells:
        n_sim, n_real = next(iter(cell.predicted.values())).shape[1], cell.n_real
        key = (cell.pair, cell.length, n_sim, n_real)
        if key not in drawn:
            real = bootstrap_weights(n_real, draws, rng)
            drawn[key] = (real if cell.paired else bootstrap_weights(n_sim, draws, rng), real)
        sim, real = drawn[key]
        result.append((sim, _restrict(real, cell.columns.get(truth))))
    return result


def _restrict(drawn: Float, columns: tuple[int, ...] | None) -> Float:
    """Weights of the samples that have the figure; a draw that hits none of them falls back to all of them alike."""
    if columns is None:
        return drawn
    part = drawn[:, list(columns)]
    total = part.sum(1, keepdims=True)
    scaled: Float = np.divide(part, total, out=np.full(part.shape, 1 / len(columns)), where=total > 0)
    return scaled


def _tied_with_best(real: Float, real_weights: Float) -> set[int]:
    """Configurations whose paired difference to the best one has an interval that includes 0."""
    best = int(real.mean(1).argmax())
    low = np.quantile((real[best] - real) @ real_weights.T, 0.025, axis=1)
    return set(np.flatnonzero(low <= TIE).tolist())


def _ceiling(real: Float, drawn: Float, rng: np.random.Generator) -> Float:
    """Tau between random halves of the samples: the mean over `SPLITS` halvings, then one figure per draw, shape (1 + D,).

    A draw weighs the samples before they are halved, so a sample drawn twice lies in one half only and the halves stay disjoint.
    """
    n, draws = real.shape[1], len(drawn)
    if n < 2:
        return np.full(1 + draws, np.nan)
    even = np.full((SPLITS, n), 1 / n)
    point = nan_mean(_tau_of_halves(real, even, rng))
    repeated = np.repeat(drawn, SPLITS_PER_DRAW, axis=0)
    spread = nan_mean(_tau_of_halves(real, repeated, rng).reshape(draws, SPLITS_PER_DRAW).T)
    return np.concatenate([[float(point)], spread])


def _tau_of_halves(real: Float, sample_weights: Float, rng: np.random.Generator) -> Float:
    """Split the samples of every row of weights into random halves; return the tau between both, NaN if one is empty."""
    n = real.shape[1]
    ranks = rng.random(sample_weights.shape).argsort(axis=1)
    first = np.where(ranks < n // 2, sample_weights, 0.0)
    second = sample_weights - first
    usable = (first.sum(1) > 0) & (second.sum(1) > 0)
    tau = np.full(len(sample_weights), np.nan)
    first, second = (half[usable] / half[usable].sum(1, keepdims=True) for half in (first, second))
    tau[usable] = tau_b(real @ first.T, real @ second.T)
    return tau
