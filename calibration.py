"""From predicted figures to a predicted score: a regression fitted on runs that were confirmed for real, with conformal intervals.

Every prompt's figures are turned into the share of answer tokens that should come out right, by a logistic curve; a
configuration's prediction is the mean over prompts. Loss of one head can ruin one answer and no more: the curve saturates, so a
few prompts with enormous harm do not outweigh many with little, as they do in a mean of harms.

Policies that were confirmed keep what they did better or worse than the curve (`kvtool.residuals`).

`kvtool analyze calibrate` makes one, `kvtool simulate --calibration` and `kvtool analyze fidelity --calibration` use it.

Shapes: F features, any shape (...) of predictions, e.g. (N configurations, S prompts).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtool.errors import DataError
from kvtool.files import write_json
from kvtool.residuals import EVIDENCE, Residuals, Setting, carried_over, identified

SCHEMA = "kvtool.calibration/1"
Float = NDArray[np.float64]
#: per-prompt figures of a simulation that the regression sees; harms enter as log(1 + harm). ``named`` is 1 where prompts name
#: their evidence, else 0: the evidence's weight is that of needles, and texts have their own level.
FEATURES = ("harm", "evidence", "named")
HARMS = frozenset({"harm", "head_harm", "layer_harm"})
#: what losing all of the evidence weighs in the risk, in powers of e of harm; anything from 4 to 16 ranks as well (docs/decisions.md)
EVIDENCE_WEIGHT = 8.0
HOW = "make one with kvtool analyze calibrate"


class Where(NamedTuple):
    """Runs that a prediction is for.

    Attributes
    ----------
    model : str
        Fingerprint.
    compress_at : str
    task : str
    length : float
        Mean tokens of the prompts.
    files : mapping of str to str
        Path -> hash of the files that policies name.
    """

    model: str
    compress_at: str
    task: str
    length: float
    files: Mapping[str, str]

    def setting(self, named: bool) -> Setting:
        """Return where errors are carried over to; `named`: prompts name their evidence."""
        return Setting(self.model, self.compress_at, EVIDENCE if named else self.task, self.length)


@dataclass(frozen=True, slots=True)
class Calibration:
    """A fitted curve from predicted figures to answer accuracy.

    Attributes
    ----------
    features : tuple of F str
    mean, scale, weights : tuple of F float
        The index is ``intercept + sum of weights (x - mean) / scale``, x as `transform` gives it.
    intercept : float
    level : float
        Coverage that the intervals promise; few runs cannot promise much, see `kvtool.analysis.calibrate.fit_calibration`.
    half_width : float
        Half the width of the interval of a configuration's mean: a quantile of errors on cells that the fit had not seen.
    gap_width : float
        The same quantile for the error of a difference, of a configuration from the predicted best of its budget: what is common to
        all of a run cancels in it.
    held_out : str
        What those cells were: ``"pair"`` (another task, mode, length or model than the fit) or ``"prompts"`` (other prompts of
        the only one there was).
    n_errors : int
        Configurations that the quantile is taken from.
    sources : tuple of dict
        Model, task, length, query mode and prompts of the runs it was fitted on.
    residuals : tuple of Residuals
        Errors of the curve on those runs, policy by policy; none in files of older versions.
    """

    features: tuple[str, ...]
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...]
    intercept: float
    level: float
    half_width: float
    gap_width: float
    held_out: str
    n_errors: int
    sources: tuple[dict[str, Any], ...]
    residuals: tuple[Residuals, ...] = ()

    def predict(self, figures: Mapping[str, Float]) -> Float:
        """Return the predicted share of right answer tokens per prompt, 0 ... 1, in the shape of the figures.

        Raises
        ------
        DataError
            A feature is missing: the simulation is older than the calibration.
        """
        return curve(self._index(figures))

    def predict_policies(
        self, figures: Mapping[str, Float], where: Where, methods: Sequence[str], shares: Sequence[float]
    ) -> tuple[Float, NDArray[np.bool_]]:
        """Return the curve's predictions with what confirmed runs of the same policies add.

        Policies with the same figures and share are one: what was confirmed of one of them holds for all.

        Parameters
        ----------
        figures : mapping of str to ndarray of shape (N, S)
        where : Where
            What is predicted; errors are carried over within it.
        methods : sequence of N str
            Policies without their budget.
        shares : sequence of N float
            Kept share of the prompt.

        Returns
        -------
        (ndarray of shape (N, S), ndarray of bool of shape (N,))
            Not cut to 0 ... 1: that would make equals of policies that confirmed runs tell apart. Second: an error of its own was
            carried over.

        Raises
        ------
        DataError
            See `predict`.
        """
        curve_values = self.predict(figures)
        setting = where.setting("evidence" in figures)
        added, confirmed = carried_over(self.residuals, setting, identified(methods, where.files), shares)
        twins: dict[tuple[Any, ...], list[int]] = {}
        for index, (row, share) in enumerate(zip(curve_values, shares, strict=True)):
            # Sums of the same entries in another order differ in the last digits.
            twins.setdefault((f"{share:.9g}", *(f"{value:.9g}" for value in row)), []).append(index)
        for group in twins.values():
            own = [index for index in group if confirmed[index]]
            if own:
                added[group], confirmed[group] = added[own].mean(), True
        return curve_values + added[:, None], confirmed

    def interval(self, predicted: float) -> tuple[float, float]:
        """Return the interval of a configuration's mean, cut to 0 ... 1."""
        return max(0.0, predicted - self.half_width), min(1.0, predicted + self.half_width)

    def _index(self, figures: Mapping[str, Float]) -> Float:
        figures = with_evidence(figures) if "harm" in figures else figures
        lacking = [name for name in self.features if name not in figures]
        if lacking:
            raise DataError(
                f"the simulation has no figure {lacking[0]!r}, which the calibration needs; run kvtool simulate again"
            )
        total = np.asarray(self.intercept, dtype=np.float64)
        for name, mean, scale, weight in zip(self.features, self.mean, self.scale, self.weights, strict=True):
            total = total + weight * (transform(name, figures[name]) - mean) / scale
        return total


def risk(figures: Mapping[str, Float]) -> Float:
    """Return what an order without any confirmed run goes by: log(1 + harm) + `EVIDENCE_WEIGHT` x lost share of the evidence.

    Harm is a first-order sum that overstates large losses, the more so the larger they are, and a few prompts would rule its mean;
    the logarithm takes both away. Evidence counts where prompts name it.

    Parameters
    ----------
    figures : mapping of str to ndarray
        ``harm`` and, if there is any, ``evidence``; other figures are ignored.

    Returns
    -------
    ndarray
        In the shape of the harm; 0 means no loss, there is no upper end.
    """
    known = with_evidence(figures)
    return transform("harm", known["harm"]) + EVIDENCE_WEIGHT * known["evidence"]


def with_evidence(figures: Mapping[str, Float]) -> dict[str, Float]:
    """Return the figures with ``evidence`` and ``named``: prompts without named evidence lose none."""
    zeros = np.zeros_like(np.asarray(figures["harm"], dtype=np.float64))
    return {"evidence": zeros, **figures, "named": zeros + float("evidence" in figures)}


def transform(name: str, values: Float) -> Float:
    """Return a feature as the regression sees it: harms span orders of magnitude and enter as logarithms."""
    return np.log1p(np.maximum(values, 0.0)) if name in HARMS else np.asarray(values, dtype=np.float64)


def curve(index: Float) -> Float:
    """Return the logistic function."""
    return 1.0 / (1.0 + np.exp(-index))


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write a calibration atomically; `read_calibration` gives the same figures back."""
    write_json(path, {"schema": SCHEMA, **asdict(calibration)})


def read_calibration(path: str | Path) -> Calibration:
    """Read a calibration.

    Raises
    ------
    DataError
        Missing, damaged, or of another schema.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"calibration {path} cannot be read ({' '.join(str(error).split())[:120]}); {HOW}") from error
    if not isinstance(value, dict) or value.pop("schema", None) != SCHEMA:
        raise DataError(f"{path} is no calibration (schema {SCHEMA!r} is needed); {HOW}")
    try:
        lists = {name: tuple(float(x) for x in value[name]) for name in ("mean", "scale", "weights")}
        known = {"residuals": tuple(map(Residuals.of, value.pop("residuals", ())))}
        found = Calibration(
            **{**value, **lists, **known, "features": tuple(value["features"]), "sources": tuple(value["sources"])}
        )
        numbers = [*found.mean, *found.scale, *found.weights, found.intercept, found.half_width, found.gap_width, found.level]
        fits = {len(found.features), len(found.mean), len(found.scale), len(found.weights)}
        if (
            len(fits) != 1
            or not np.isfinite(numbers).all()
            or min(found.scale) <= 0
            or min(found.half_width, found.gap_width) < 0
            or not 0 < found.level <= 1
        ):
            raise ValueError("its numbers do not fit together")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"calibration {path} is damaged ({error}); {HOW}") from error
    return found
