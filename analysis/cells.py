"""Join prediction and reality: one cell per pair of folders and budget.

Shapes: N configurations of a budget, S samples.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kvtool.analysis.load import Float, Reality, Simulation, check_belongs
from kvtool.calibration import Where

if TYPE_CHECKING:
    from kvtool.calibration import Calibration

#: predictor -> sign that makes larger better; "calibrated" only with a calibration, refined figures only where every configuration
#: of the cell was refined
PREDICTORS = {
    "calibrated": 1.0,
    "risk": -1.0,
    "harm": -1.0,
    "head_harm": -1.0,
    "layer_harm": -1.0,
    "missing": -1.0,
    "evidence": -1.0,
    "recall": 1.0,
    "retention": 1.0,
    "refined_nll": -1.0,
    "refined_accuracy": 1.0,
}
#: real figure -> sign that makes larger better
TRUTHS = {"answer_accuracy": 1.0, "answer_exact": 1.0, "score": 1.0, "answer_nll": -1.0, "answer_margin": 1.0}
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
        Larger is better; the samples of the simulation.
    real : dict of str to ndarray of shape (N, S)
        Larger is better; the samples of the run that have the figure.
    paired : bool
        Both sides hold the same samples, which are then resampled together.
    pair : int
        Number of the pair of folders.
    columns : dict of str to tuple of int
        Per real figure: which samples of the run have it; a figure that is not listed is there for all.
    task, compress_at : str or None
    """

    length: int | None
    budget: str
    policies: tuple[str, ...]
    predicted: dict[str, Float]
    real: dict[str, Float]
    paired: bool
    pair: int = 0
    columns: dict[str, tuple[int, ...]] = field(default_factory=dict)
    n_run: int | None = None
    task: str | None = None
    compress_at: str | None = None

    @property
    def n_real(self) -> int:
        """Samples of the run, those without some figure included."""
        return self.n_run or max(values.shape[1] for values in self.real.values())


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Configurations that count nowhere, by reason.

    Attributes
    ----------
    degenerate : int
        Nothing is left to choose: budget = sink + window.
    impossible : int
        The budget is below the protected entries, in the simulation or in the run.
    out_of_memory : int
    failed : int
        Given up, as every worker that ran one of its samples died.
    not_run : int
        Simulated only.
    alone : int
        Fewer than three configurations at this budget.
    """

    degenerate: int = 0
    impossible: int = 0
    out_of_memory: int = 0
    failed: int = 0
    not_run: int = 0
    alone: int = 0

    def __add__(self, other: LeftOut) -> LeftOut:
        return LeftOut(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))

    def text(self) -> str:
        """Return e.g. ``4 degenerate, 2 impossible``, or ``none``."""
        words = ((name.replace("_", " "), getattr(self, name)) for name in self.__slots__)
        return ", ".join(f"{n} {word}" for word, n in words if n) or "none"


def build_cells(
    simulation: Simulation, reality: Reality, pair: int = 0, calibration: Calibration | None = None
) -> tuple[list[Cell], LeftOut]:
    """Join prediction and reality per budget.

    Returns
    -------
    (list of Cell, LeftOut)

    Raises
    ------
    ConfigError
        Folders that do not belong together.
    """
    check_belongs(simulation, reality)
    groups: dict[str, list[dict[str, Any]]] = {}
    left_out = LeftOut()
    for row in simulation.rows:
        if row["budget"] is None:
            continue
        reason = _why_left_out(row, reality)
        if reason:
            left_out += LeftOut(**{reason: 1})
        else:
            groups.setdefault(row["budget"], []).append(row)
    measured = {name: _columns(reality, name) for name in TRUTHS}
    cells = []
    for budget, rows in groups.items():
        if len(rows) < MIN_POLICIES:
            left_out += LeftOut(alone=len(rows))
            continue
        real = {name: np.stack([_real(reality, row["policy"], name) for row in rows]) for name in TRUTHS if measured[name]}
        if real:
            policies = tuple(str(row["policy"]) for row in rows)
            cells.append(
                Cell(
                    length=reality.config.get("length"),
                    budget=budget,
                    policies=policies,
                    predicted=_predicted(rows, simulation, reality, calibration),
                    real=real,
                    paired=_same_prompts(simulation, reality),
                    pair=pair,
                    columns=measured,
                    n_run=len(reality.samples),
                    task=reality.config.get("task"),
                    compress_at=reality.config.get("compress_at"),
                )
            )
    return cells, left_out


def _why_left_out(row: dict[str, Any], reality: Reality) -> str | None:
    records = reality.of(row["policy"])
    statuses = {record["status"] for record in records}
    if row["status"] != "ok" or "impossible" in statuses:
        return "impossible"
    if row["degenerate"] or any(record["degenerate"] for record in records):
        return "degenerate"
    if not records:
        return "not_run"
    if "failed" in statuses:
        return "failed"
    return "out_of_memory" if statuses != {"ok"} else None


def _columns(reality: Reality, name: str) -> tuple[int, ...]:
    having = set(reality.measured(name))
    return tuple(index for index, sample in enumerate(reality.samples) if sample in having)


def _real(reality: Reality, policy: str, name: str) -> Float:
    values = reality.values(policy, name)
    assert values is not None  # every sample of this policy is ok, and some have the figure
    return TRUTHS[name] * values


def where_of(simulation: Simulation, reality: Reality) -> Where:
    """Return what a pair of folders is of, for a calibration."""
    config = reality.config
    files = simulation.config.get("heads") or {}
    return Where(str(config["fingerprint"]), str(config["compress_at"]), str(config["task"]), reality.mean_length, files)


def _predicted(
    rows: list[dict[str, Any]], simulation: Simulation, reality: Reality, calibration: Calibration | None
) -> dict[str, Float]:
    """Return what is predicted per sample, larger is better, shape (N, S) each."""
    names = [name for name in PREDICTORS if all(name in row["per_sample"] for row in rows)]
    figures = {name: np.asarray([row["per_sample"][name] for row in rows], dtype=np.float64) for name in names}
    figures["retention"] = np.asarray([[row["retention"]] * figures["harm"].shape[1] for row in rows])
    if calibration is not None:
        shares = [row["retention"] for row in rows]
        methods = [row["method"] for row in rows]
        figures["calibrated"] = calibration.predict_policies(figures, where_of(simulation, reality), methods, shares)[0]
    if all(row.get("refined") for row in rows):
        for name in ("nll", "accuracy"):
            figures[f"refined_{name}"] = np.asarray([row["refined"]["per_sample"][name] for row in rows], dtype=np.float64)
    return {name: PREDICTORS[name] * _without_gaps(figures[name]) for name in PREDICTORS if name in figures}


def _without_gaps(values: Float) -> Float:
    """Samples without the figure (an answer of one token has no margin) count alike for all configurations: no order."""
    return np.where(np.isnan(values).any(axis=0), 0.0, values)


def _same_prompts(simulation: Simulation, reality: Reality) -> bool:
    ids = simulation.provenance.get("samples")
    if ids is not None:
        return bool(ids == reality.samples)
    same_seed = simulation.config.get("prompt_seed") == reality.config.get("seed")
    return bool(same_seed and simulation.config.get("n") == len(reality.samples))
