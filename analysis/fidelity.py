"""How well the offline ranking agrees with reality, measured like an instrument.

For every prompt length and budget the configurations are ranked by a predictor and by what really happened; Kendall's tau-b
compares both orders, and the mean over budgets is reported: a tau over all budgets together would be inflated, as the budget
alone explains most of it. Shapes: B budgets, N configurations of a budget, S samples, D draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvtool.analysis.load import Float, Reality, Simulation, check_belongs
from kvtool.analysis.statistics import Interval, percentile_interval, tau_b, weights
from kvtool.errors import DataError

#: predictor -> sign that makes larger better
PREDICTORS = {"harm": -1.0, "recall": 1.0}
#: real figure -> sign that makes larger better
TRUTHS = {"answer_accuracy": 1.0, "score": 1.0, "answer_nll": -1.0, "answer_margin": 1.0}
#: tops whose regret and recall are reported
TOPS = (1, 3)
MIN_POLICIES = 3


@dataclass(frozen=True, slots=True)
class Cell:
    """One budget of one pair of folders.

    Attributes
    ----------
    length : int or None
        Prompt length.
    budget : str
    policies : tuple of str
    predicted : dict of str to ndarray of shape (N, S)
        Larger is better.
    real : dict of str to ndarray of shape (N, S)
        Larger is better.
    paired : bool
        Both sides hold the same samples, which are then resampled together.
    """

    length: int | None
    budget: str
    policies: tuple[str, ...]
    predicted: dict[str, Float]
    real: dict[str, Float]
    paired: bool


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement of the predictors with one real figure, means over budgets.

    Attributes
    ----------
    truth : str
    n_cells : int
        Budgets that count; those where all configurations do equally well in reality have no order and are left out.
    n_tied : int
        Budgets left out for that reason.
    ceiling : float
        Mean tau between random halves of the real samples: what a perfect predictor could hope for with half the samples.
    tau : dict of str to Interval
        Per predictor.
    advantage : Interval
        tau of the harm minus tau of attention recall, same draws.
    regret : dict of str to dict of str to Interval
        Per predictor and top k: best real value minus the best among the predicted top k.
    tied_best_recall : dict of str to dict of str to float
        Per predictor and top k: share of the configurations statistically tied with the best that are in the top k (or,
        with more than k of them, of k).
    """

    truth: str
    n_cells: int
    n_tied: int
    ceiling: float
    tau: dict[str, Interval]
    advantage: Interval
    regret: dict[str, dict[str, Interval]]
    tied_best_recall: dict[str, dict[str, float]]


def build_cells(simulation: Simulation, reality: Reality) -> tuple[list[Cell], int]:
    """Join prediction and reality per budget.

    Returns
    -------
    (list of Cell, int)
        The cells, and how many configurations were left out as degenerate, impossible or not run.
    """
    check_belongs(simulation, reality)
    groups: dict[str, list[tuple[dict[str, object], dict[str, Float]]]] = {}
    left_out = 0
    for row in simulation.rows:
        if row["budget"] is None:
            continue
        real = {name: reality.values(row["policy"], name) for name in TRUTHS}
        found = {name: sign * v for (name, sign), v in zip(TRUTHS.items(), real.values(), strict=True) if v is not None}
        if row["status"] != "ok" or row["degenerate"] or len(found) < len(TRUTHS):
            left_out += 1
            continue
        groups.setdefault(row["budget"], []).append((row, found))
    same = simulation.config.get("prompt_seed") == reality.config.get("seed") and _same_size(simulation, reality)
    cells = []
    for budget, members in groups.items():
        if len(members) < MIN_POLICIES:
            left_out += len(members)
            continue
        predicted = {
            name: sign * np.asarray([row["per_sample"][name] for row, _ in members], dtype=np.float64)  # type: ignore[index]
            for name, sign in PREDICTORS.items()
        }
        real_arrays = {name: np.stack([found[name] for _, found in members]) for name in TRUTHS}
        policies = tuple(str(row["policy"]) for row, _ in members)
        cells.append(Cell(reality.config.get("length"), budget, policies, predicted, real_arrays, same))
    return cells, left_out


def _same_size(simulation: Simulation, reality: Reality) -> bool:
    return bool(simulation.config.get("n") == len(reality.samples))


def measure_agreement(cells: Sequence[Cell], truth: str, draws: int, seed: int) -> Agreement:
    """Measure tau, regret and recall over all cells, with intervals from resampled prompts.

    Parameters
    ----------
    cells : sequence of Cell
    truth : str
        Key of `TRUTHS`.
    draws, seed : int

    Raises
    ------
    DataError
        In no cell do the configurations differ in reality.
    """
    ordered = [cell for cell in cells if np.ptp(cell.real[truth].mean(1)) > 1e-9]
    if not ordered:
        raise DataError(f"all configurations do equally well by {truth!r} in reality: there is no order to predict")
    rng = np.random.default_rng(seed)
    drawn_weights = _draw_weights(ordered, draws, rng)
    taus: dict[str, list[Float]] = {name: [] for name in PREDICTORS}
    points: dict[str, list[float]] = {name: [] for name in PREDICTORS}
    regrets: dict[str, dict[int, list[Float]]] = {name: {k: [] for k in TOPS} for name in PREDICTORS}
    recalls: dict[str, dict[int, list[float]]] = {name: {k: [] for k in TOPS} for name in PREDICTORS}
    for cell, (sim_weights, real_weights) in zip(ordered, drawn_weights, strict=True):
        real = cell.real[truth]
        real_draws = np.column_stack([real.mean(1), real @ real_weights.T])
        tied = _tied_with_best(real, real_weights)
        for name in PREDICTORS:
            predicted = cell.predicted[name]
            predicted_draws = np.column_stack([predicted.mean(1), predicted @ sim_weights.T])
            # A predictor without any order says nothing: tau 0, not undefined.
            tau = tau_b(predicted_draws, real_draws)
            tau[(np.ptp(predicted_draws, axis=0) < 1e-12) & np.isnan(tau)] = 0.0
            points[name].append(float(tau[0]))
            taus[name].append(tau[1:])
            ranks = np.argsort(-predicted_draws, axis=0, kind="stable")
            for k in TOPS:
                top = np.take_along_axis(real_draws, ranks[:k], axis=0).max(0)
                regrets[name][k].append(real_draws.max(0) - top)
                hits = len(set(ranks[:k, 0].tolist()) & tied)
                recalls[name][k].append(hits / min(k, len(tied)))
    mean_taus = {name: np.nanmean(np.stack(values), axis=0) for name, values in taus.items()}
    point = {name: float(np.nanmean(values)) for name, values in points.items()}
    return Agreement(
        truth=truth,
        n_cells=len(ordered),
        n_tied=len(cells) - len(ordered),
        ceiling=_ceiling(ordered, truth, rng),
        tau={name: percentile_interval(point[name], mean_taus[name]) for name in PREDICTORS},
        advantage=percentile_interval(point["harm"] - point["recall"], mean_taus["harm"] - mean_taus["recall"]),
        regret={
            name: {
                f"top{k}": percentile_interval(float(np.mean([v[0] for v in values])), np.mean([v[1:] for v in values], axis=0))
                for k, values in by_k.items()
            }
            for name, by_k in regrets.items()
        },
        tied_best_recall={name: {f"top{k}": float(np.mean(v)) for k, v in by_k.items()} for name, by_k in recalls.items()},
    )


def _draw_weights(cells: Sequence[Cell], draws: int, rng: np.random.Generator) -> list[tuple[Float, Float]]:
    """One resampling of prompts per length, shared by its budgets; the same for prediction and reality where paired."""
    drawn: dict[tuple[object, ...], tuple[Float, Float]] = {}
    result = []
    for cell in cells:
        n_sim, n_real = (next(iter(v.values())).shape[1] for v in (cell.predicted, cell.real))
        key = (cell.length, n_sim, n_real)
        if key not in drawn:
            real = weights(n_real, draws, rng)
            drawn[key] = (real if cell.paired else weights(n_sim, draws, rng), real)
        result.append(drawn[key])
    return result


def _tied_with_best(real: Float, real_weights: Float) -> set[int]:
    """Configurations whose paired difference to the best one has an interval that includes 0."""
    best = int(real.mean(1).argmax())
    low = np.quantile((real[best] - real) @ real_weights.T, 0.025, axis=1)
    return set(np.flatnonzero(low <= 1e-12).tolist())


def _ceiling(cells: Sequence[Cell], truth: str, rng: np.random.Generator, splits: int = 200) -> float:
    taus = []
    for cell in cells:
        real = cell.real[truth]
        n = real.shape[1]
        if n < 2:
            continue
        halves = np.stack([np.isin(np.arange(n), rng.permutation(n)[: n // 2]) for _ in range(splits)]).astype(np.float64)
        first = real @ (halves / halves.sum(1, keepdims=True)).T
        second = real @ ((1 - halves) / (1 - halves).sum(1, keepdims=True)).T
        tau = tau_b(first, second)
        if not np.isnan(tau).all():
            taus.append(float(np.nanmean(tau)))
    return float(np.mean(taus)) if taus else float("nan")
