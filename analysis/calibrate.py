"""Fit a calibration on simulate folders and the infer folders that confirmed them.

Shapes: N configurations, S prompts, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kvtool.analysis.cells import where_of
from kvtool.analysis.controls import check_decoding
from kvtool.analysis.load import Float, Reality, Simulation, check_belongs, load_reality, load_simulation
from kvtool.analysis.statistics import tau_b
from kvtool.calibration import FEATURES, Calibration, curve, risk, transform, with_evidence, write_calibration
from kvtool.errors import ConfigError, DataError
from kvtool.residuals import Residuals, Setting, carried_over, identified

LEVEL = 0.9
#: folds over prompts where there is only one pair of folders
FOLDS = 5
TRUTH = "answer_accuracy"
#: least configurations and prompts of a pair
LEAST = 3


@dataclass(frozen=True, slots=True)
class Confirmed:
    """One pair of folders: what was predicted and what came true.

    Attributes
    ----------
    figures : dict of str to ndarray of shape (N, S)
    real : ndarray of shape (N, S)
        Answer accuracy, 0 ... 1.
    budgets : tuple of N str
    methods : tuple of N str
        Policies without their budget.
    shares : tuple of N float
        Kept share of the prompt.
    source : dict
        What the pair is.
    setting : Setting
        Where its errors are carried over to.
    """

    figures: dict[str, Float]
    real: Float
    budgets: tuple[str, ...]
    methods: tuple[str, ...]
    shares: tuple[float, ...]
    source: dict[str, Any]
    setting: Setting


@dataclass(frozen=True, slots=True)
class _Fit:
    mean: Float
    scale: Float
    weights: Float
    intercept: float

    def predict(self, figures: Mapping[str, Float]) -> Float:
        return curve(self.intercept + (_stack(figures) - self.mean) / self.scale @ self.weights)


def confirmed(simulation: Simulation, reality: Reality) -> Confirmed:
    """Join a simulation and a run, prompt by prompt.

    Raises
    ------
    ConfigError
        They do not belong together, or are of different prompts.
    DataError
        Too few configurations have both sides.
    """
    check_belongs(simulation, reality)
    if simulation.config.get("prompt_seed") != reality.config.get("seed") or simulation.config.get("n") != len(reality.samples):
        raise ConfigError(
            f"{simulation.folder} is of {simulation.config.get('n')} prompts of seed {simulation.config.get('prompt_seed')}, "
            f"{reality.folder} of {len(reality.samples)} of seed {reality.config.get('seed')}; a calibration needs the same prompts "
            "on both sides"
        )
    having = set(reality.measured(TRUTH))
    columns = [i for i, sample in enumerate(reality.samples) if sample in having]
    # Evidence is a figure of all rows of a simulation or of none.
    figures: dict[str, list[Any]] = {name: [] for name in FEATURES if any(name in row["per_sample"] for row in simulation.rows)}
    real, budgets, methods, shares = [], [], [], []
    for row in simulation.rows:
        values = reality.values(row["policy"], TRUTH)
        if row["status"] != "ok" or row["degenerate"] or row.get("yardstick") or values is None:
            continue
        if "harm" not in row["per_sample"]:
            raise DataError(
                f"{simulation.folder} lacks figures that a calibration needs; run kvtool simulate again into a new folder"
            )
        for name in figures:
            figures[name].append([row["per_sample"][name][i] for i in columns])
        real.append(values)
        budgets.append(row["budget"] or "own")
        methods.append(row["method"])
        shares.append(row["retention"])
    if len(real) < LEAST or len(columns) < LEAST:
        raise DataError(
            f"{simulation.folder} and {reality.folder} share {len(real)} configurations on {len(columns)} prompts with an answer "
            f"accuracy; at least {LEAST} of each are needed"
        )
    keys = {"task": "task", "length": "length", "compress_at": "compress_at", "prompt_seed": "seed"}
    source = {"model": simulation.config["model"]["fingerprint"], **{k: simulation.config.get(s) for s, k in keys.items()}}
    source |= {"prompt_seed": simulation.config.get("prompt_seed"), "prompts": len(columns), "configurations": len(real)}
    known = with_evidence({k: np.asarray(v, dtype=np.float64) for k, v in figures.items()})
    where = where_of(simulation, reality)
    setting = where.setting("evidence" in figures)
    methods = identified(methods, where.files)
    return Confirmed(known, np.asarray(real), tuple(budgets), tuple(methods), tuple(shares), source, setting)


def fit_calibration(pairs: Sequence[Confirmed], level: float = LEVEL) -> Calibration:
    """Fit the curve on all pairs; the interval's width comes from pairs (or prompts) that a fit had not seen.

    The errors of a configuration's mean are collected by leaving out one pair at a time, or one of `FOLDS` sets of prompts if there
    is one pair only (leaving out in turn as in the jackknife+, Barber et al. 2021). Errors of one pair are alike, so it is pairs, not
    configurations, that are exchangeable: the next pair counts as one more with errors without bound (pooled distributions of
    groups, Dunn, Wasserman and Ramdas 2022). With G pairs that promises G / (G + 1) at most, by the largest error there was.

    Raises
    ------
    DataError
        The runs do not show what compression costs: every configuration does the same, or better where more was lost.
    """
    if len(pairs) > 1:
        splits = [([p for k, p in enumerate(pairs) if k != i], pair) for i, pair in enumerate(pairs)]
    else:
        fold = np.arange(pairs[0].real.shape[1]) % FOLDS
        splits = [([_part(pairs[0], fold != k)], _part(pairs[0], fold == k)) for k in np.unique(fold)]
    errors = [_errors(_predict(_fit(seen), seen, unseen), unseen) for seen, unseen in splits]
    found = [each[0] for each in errors]
    gaps = [each[1] for each in errors if len(each[1])]
    fit = _fit(pairs)
    _refuse_without_order(fit, pairs)
    half_width = _conformal(found, level, len(pairs))
    return Calibration(
        features=FEATURES,
        mean=tuple(fit.mean.tolist()),
        scale=tuple(fit.scale.tolist()),
        weights=tuple(fit.weights.tolist()),
        intercept=fit.intercept,
        level=min(level, len(pairs) / (len(pairs) + 1)) if len(pairs) > 1 else level,
        half_width=half_width,
        # Where no budget has two policies, a difference errs by twice what a mean errs at most.
        gap_width=_conformal(gaps, level, len(pairs)) if gaps else 2 * half_width,
        held_out="pair" if len(pairs) > 1 else "prompts",
        n_errors=sum(map(len, found)),
        sources=tuple(pair.source for pair in pairs),
        residuals=tuple(_residuals(fit, pair) for pair in pairs),
    )


def _refuse_without_order(fit: _Fit, pairs: Sequence[Confirmed]) -> None:
    """Refuse runs that say nothing of compression, e.g. of a task that the model cannot do with its full cache either."""
    means = [pair.real.mean(1) for pair in pairs]
    if max(float(np.ptp(mean)) for mean in means) == 0:
        shown = ", ".join(dict.fromkeys(f"{mean[0]:.2f}" for mean in means))
        raise DataError(
            f"every configuration has the same real accuracy ({shown}): there is nothing to calibrate on; confirm other budgets or tasks"
        )
    tau = np.mean([tau_b(fit.predict(p.figures).mean(1)[:, None], -risk(p.figures).mean(1)[:, None])[0] for p in pairs])
    if not tau > 0:
        raise DataError(
            "in these runs answers are as good or better where more risk was predicted, so a calibration would turn the ranking "
            "around; can the model do the task with its full cache (row full of kvtool infer)? Confirm other tasks or budgets"
        )


def _residuals(fit: _Fit, pair: Confirmed) -> Residuals:
    errors = pair.real.mean(1) - fit.predict(pair.figures).mean(1)
    return Residuals(pair.setting, pair.methods, pair.shares, tuple(errors.tolist()))


def _predict(fit: _Fit, seen: Sequence[Confirmed], unseen: Confirmed) -> Float:
    """Return the means of a pair, shape (N,), from a fit and the errors of the pairs that it saw."""
    known = [_residuals(fit, pair) for pair in seen]
    added, _ = carried_over(known, unseen.setting, unseen.methods, unseen.shares)
    return np.asarray(fit.predict(unseen.figures).mean(1) + added, dtype=np.float64)


def _errors(predicted: Float, pair: Confirmed) -> tuple[Float, Float]:
    """Return the errors of the N means, and of the others' differences from the predicted best of their budget."""
    error = predicted - pair.real.mean(1)
    gaps = []
    for budget in dict.fromkeys(pair.budgets):
        members = np.flatnonzero(np.asarray(pair.budgets) == budget)
        best = members[predicted[members].argmax()]
        gaps.append(error[members[members != best]] - error[best])
    return np.abs(error), np.abs(np.concatenate(gaps))


def _conformal(errors: Sequence[Float], level: float, n_pairs: int) -> float:
    """Return the quantile of grouped errors; every group weighs the same, and one more lies at infinity."""
    n = n_pairs if n_pairs > 1 else sum(map(len, errors))
    values = np.concatenate(list(errors))
    mass = np.concatenate([np.full(len(e), 1 / (len(e) * len(errors))) for e in errors])
    order = np.argsort(values)
    reached = np.cumsum(mass[order])
    place = int(np.searchsorted(reached, level * (n + 1) / n - 1e-12))
    return float(values[order[min(place, len(values) - 1)]])


def _part(pair: Confirmed, columns: Any) -> Confirmed:
    return replace(pair, figures={k: v[:, columns] for k, v in pair.figures.items()}, real=pair.real[:, columns])


def _stack(figures: Mapping[str, Float]) -> Float:
    return np.stack([transform(name, figures[name]) for name in FEATURES], axis=-1)


def _fit(pairs: Sequence[Confirmed]) -> _Fit:
    """Logistic regression on shares: each (configuration, prompt) counts as right with its accuracy and as wrong with the rest.

    Every pair weighs the same, however many prompts it has.
    """
    from sklearn.linear_model import LogisticRegression

    x = np.concatenate([_stack(p.figures).reshape(-1, len(FEATURES)) for p in pairs])
    y = np.concatenate([p.real.ravel() for p in pairs])
    weight = np.concatenate([np.full(p.real.size, 1 / p.real.size) for p in pairs])
    weight *= len(y) / weight.sum()
    mean, spread = x.mean(0), x.std(0)
    # A feature that never varied here (all prompts name evidence, or none does) gets no weight, wherever it is applied.
    scale = np.where(spread > 1e-9, spread, 1.0)
    z = (x - mean) / scale
    label = np.repeat([1, 0], len(y))
    model = LogisticRegression(C=1.0, max_iter=500).fit(
        np.concatenate([z, z]), label, sample_weight=np.concatenate([weight * y, weight * (1 - y)])
    )
    return _Fit(mean, scale, model.coef_[0].astype(np.float64), float(model.intercept_[0]))


@dataclass(frozen=True, slots=True)
class CalibrateSummary:
    """What was fitted."""

    path: Path
    calibration: Calibration

    def text(self) -> str:
        """Return what the command prints."""
        c = self.calibration
        weights = ", ".join(f"{name} {weight:+.2f}" for name, weight in zip(c.features, c.weights, strict=True))
        unseen = "pairs of folders" if c.held_out == "pair" else "prompts"
        return (
            f"answer accuracy from {len(c.sources)} confirmed run{'s' * (len(c.sources) > 1)}; weights per standard deviation: {weights}\n"
            f"{100 * c.level:.0f} % intervals: ± {c.half_width:.3f}, of differences ± {c.gap_width:.3f} (errors of {c.n_errors} "
            f"configurations on {unseen} that the fit had not seen)\n"
            f"{self.path}"
        )


def run_calibrate(folders: Sequence[tuple[Path, Path]], out: Path) -> CalibrateSummary:
    """Fit a calibration on pairs of (simulate folder, infer folder) and write it.

    Raises
    ------
    ConfigError, DataError
        See `confirmed`.
    """
    loaded = [(load_simulation(simulated), load_reality(run)) for simulated, run in folders]
    check_decoding([reality for _, reality in loaded])
    pairs = [confirmed(simulation, reality) for simulation, reality in loaded]
    calibration = fit_calibration(pairs)
    write_calibration(out, calibration)
    return CalibrateSummary(out, calibration)
