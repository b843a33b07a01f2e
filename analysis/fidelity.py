"""How well the offline ranking agrees with reality, measured like an instrument.

For every prompt length and budget the configurations are ranked by a predictor and by what really happened; Kendall's tau-b
compares both orders, and the mean over budgets is reported: a tau over all budgets together would be inflated, as the budget
alone explains most of it. Shapes: N configurations of a budget, S samples, D draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvtool.analysis.cells import PREDICTORS, Cell
from kvtool.analysis.load import Float
from kvtool.analysis.statistics import TIE, Interval, nan_mean, percentile_interval, tau_b, weights
from kvtool.errors import DataError

#: tops whose regret and recall are reported
TOPS = (1, 3)
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


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement of the predictors with one real figure, means over cells.

    Attributes
    ----------
    truth : str
    n_cells : int
        Cells that count; those where all configurations do equally well in reality have no order and are left out.
    n_tied : int
        Cells left out for that reason.
    ceiling : Interval
        Mean tau between random halves of the real samples: how far reality agrees with itself on half the samples.
    tau : dict of str to Interval
        Per predictor.
    n_cells_of : dict of str to int
        Cells per predictor; refined figures exist only where all configurations of a budget were refined.
    advantage : Interval
        tau of the harm minus tau of attention recall, same draws.
    regret : dict of str to dict of str to Interval
        Per predictor and top k: best real value minus the best among the predicted top k.
    tied_best_recall : dict of str to dict of str to Interval
        Per predictor and top k: share of the configurations statistically tied with the best that are in the top k; with
        more than k of them, share of k.
    cells : tuple of CellAgreement
    """

    truth: str
    n_cells: int
    n_tied: int
    ceiling: Interval
    tau: dict[str, Interval]
    n_cells_of: dict[str, int]
    advantage: Interval
    regret: dict[str, dict[str, Interval]]
    tied_best_recall: dict[str, dict[str, Interval]]
    cells: tuple[CellAgreement, ...]


@dataclass(frozen=True, slots=True)
class _Measured:
    """Figures of one predictor in one cell; entry 0 is the point estimate, the others are the draws, shape (1 + D,)."""

    tau: Float
    regret: dict[int, Float]
    recall: dict[int, Float]


def measure_agreement(cells: Sequence[Cell], truth: str, draws: int, seed: int) -> Agreement:
    """Measure tau, regret and recall over all cells, with intervals from resampled prompts.

    Parameters
    ----------
    cells : sequence of Cell
    truth : str
        Key of `kvtool.analysis.cells.TRUTHS`.
    draws, seed : int

    Raises
    ------
    DataError
        In no cell do the configurations differ in reality.
    """
    having = [cell for cell in cells if truth in cell.real]
    ordered = [cell for cell in having if np.ptp(cell.real[truth].mean(1)) > TIE]
    if not ordered:
        raise DataError(f"all configurations do equally well by {truth!r} in reality: there is no order to predict")
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
        n_tied=len(having) - len(ordered),
        ceiling=_interval(nan_mean(np.stack(ceilings))),
        tau={name: _interval(taus[name]) for name in names},
        n_cells_of={name: len(of[name]) for name in names},
        advantage=_interval(taus["harm"] - taus["recall"]),
        regret={n: {f"top{k}": _interval(nan_mean(np.stack([m.regret[k] for m in of[n]]))) for k in TOPS} for n in names},
        tied_best_recall={
            n: {f"top{k}": _interval(nan_mean(np.stack([m.recall[k] for m in of[n]]))) for k in TOPS} for n in names
        },
        cells=tuple(
            CellAgreement(c.length, c.budget, len(c.policies), {n: _interval(v.tau) for n, v in m.items()}, float(top[0]))
            for c, m, top in zip(ordered, measured, ceilings, strict=True)
        ),
    )


def _interval(values: Float) -> Interval:
    return percentile_interval(float(values[0]), values[1:])


def _measure(cell: Cell, truth: str, drawn: tuple[Float, Float], rng: np.random.Generator) -> dict[str, _Measured]:
    """Compare every predictor of a cell with one real figure."""
    sim_weights, real_weights = drawn
    real = cell.real[truth]
    real_draws = np.column_stack([real.mean(1), real @ real_weights.T])
    has_order = np.ptp(real_draws, axis=0) > TIE
    tied = _tied_with_best(real, real_weights)
    found = {}
    for name, predicted in cell.predicted.items():
        predicted_draws = np.column_stack([predicted.mean(1), predicted @ sim_weights.T])
        tau = tau_b(predicted_draws, real_draws)
        # A predictor without any order says nothing: tau 0. Where reality has no order, tau stays undefined for all.
        tau[has_order & np.isnan(tau)] = 0.0
        regret, recall = _tops(predicted_draws, real_draws, tied, rng)
        found[name] = _Measured(tau, regret, recall)
    return found


def _tops(predicted: Float, real: Float, tied: set[int], rng: np.random.Generator) -> tuple[dict[int, Float], dict[int, Float]]:
    """Return regret and recall of the predicted tops, per k of shape (1 + D,).

    Ties of the predictor are broken at random, not by the order in the file: one order per draw, the mean over
    `TIE_ORDERS` of them for the point estimate.
    """
    predicted = np.column_stack([np.repeat(predicted[:, :1], TIE_ORDERS, axis=1), predicted[:, 1:]])
    real = np.column_stack([np.repeat(real[:, :1], TIE_ORDERS, axis=1), real[:, 1:]])
    ranks = np.lexsort((rng.random(predicted.shape), -np.round(predicted / TIE) * TIE), axis=0)
    is_tied = np.isin(ranks, sorted(tied))
    regret, recall = {}, {}
    for k in TOPS:
        lost = real.max(0) - np.take_along_axis(real, ranks[:k], axis=0).max(0)
        hits = is_tied[:k].sum(0) / min(k, len(tied))
        regret[k], recall[k] = (np.concatenate([[v[:TIE_ORDERS].mean()], v[TIE_ORDERS:]]) for v in (lost, hits))
    return regret, recall


def _draw_weights(cells: Sequence[Cell], truth: str, draws: int, rng: np.random.Generator) -> list[tuple[Float, Float]]:
    """One resampling of prompts per pair of folders, shared by its budgets and, where paired, by prediction and reality."""
    drawn: dict[tuple[object, ...], tuple[Float, Float]] = {}
    result = []
    for cell in cells:
        n_sim, n_real = next(iter(cell.predicted.values())).shape[1], cell.n_real
        key = (cell.pair, cell.length, n_sim, n_real)
        if key not in drawn:
            real = weights(n_real, draws, rng)
            drawn[key] = (real if cell.paired else weights(n_sim, draws, rng), real)
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
