"""Predictions of all samples -> one row per configuration, ranked within its budget.

Shapes: N configurations, S samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvtool.bootstrap import bootstrap_weights
from kvtool.calibration import risk
from kvtool.policies.text import method_key
from kvtool.simulate.evaluate import Prediction
from kvtool.simulate.pareto import pareto_front

if TYPE_CHECKING:
    from kvtool.calibration import Calibration, Where
    from kvtool.models import ModelInfo
    from kvtool.policies import Policy

Float = NDArray[np.float64]


@dataclass(slots=True)
class Row:
    """One configuration.

    Attributes
    ----------
    policy, method : str
        Text form; the same without the budget.
    budget : str or None
    retention, entries : float
        Means over samples of what the policy keeps (or was asked to keep, if impossible).
    status : str
        ``"ok"`` or ``"impossible"`` (with `message`): the budget is smaller than the protected entries of a sample.
    degenerate : bool
        In any sample nothing is left to choose.
    harm, harm_low, harm_high : float or None
        Mean over samples and its 95 % bootstrap interval.
    risk, risk_low, risk_high : float or None
        What the ranking goes by without a calibration, see `kvtool.calibration.risk`; mean over samples with its interval.
    margin_change, recall, layer_harm, head_harm, missing, evidence : float or None
        Means over samples, see `kvtool.simulate.curves.Curves`; recall over those that have one (none with an answer of one token).
    predicted, predicted_low, predicted_high : float or None
        Answer accuracy that a calibration predicts, with its interval; cut to 0 ... 1, with a note.
    confirmed : bool
        The calibration carried over what confirmed runs showed of this very policy.
    per_sample : dict of str to list of float
    kv_bytes_fp16 : int
        Planned bytes of the compressible layers at two bytes a number, mean over samples.
    rank : int or None
        Within the budget by risk, or by the predicted accuracy where there is a calibration; 1 is best, equals share a rank.
    pareto : bool
        No other configuration keeps at most as much at no more risk.
    shortlisted : bool
    refined : dict or None
        Figures of the masked forward, see `kvtool.simulate.refine`.
    yardstick : bool
        No real run can have it (``oracle``): never ranked, shortlisted or refined.
    note : str or None
        What the predicted figures leave out, from the first sample that says so.
    """

    policy: str
    method: str
    budget: str | None
    retention: float
    entries: float
    status: str
    message: str | None
    degenerate: bool
    harm: float | None = None
    harm_low: float | None = None
    harm_high: float | None = None
    risk: float | None = None
    risk_low: float | None = None
    risk_high: float | None = None
    margin_change: float | None = None
    recall: float | None = None
    layer_harm: float | None = None
    head_harm: float | None = None
    missing: float | None = None
    evidence: float | None = None
    predicted: float | None = None
    predicted_low: float | None = None
    predicted_high: float | None = None
    per_sample: dict[str, list[float]] = field(default_factory=dict)
    kv_bytes_fp16: int = 0
    rank: int | None = None
    pareto: bool = False
    shortlisted: bool = False
    refined: dict[str, Any] | None = None
    yardstick: bool = False
    note: str | None = None
    confirmed: bool = False

    @property
    def loss(self) -> list[float]:
        """What the ranking goes by, per sample, smaller is better: wrong share of the answer if calibrated, else the risk."""
        predicted = self.per_sample.get("predicted")
        return [1.0 - p for p in predicted] if predicted else self.per_sample["risk"]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


#: figures that a row keeps of every sample
KEPT = ("harm", "recall", "layer_harm", "head_harm", "missing", "evidence")


def resample_weights(n_samples: int, draws: int, seed: int) -> Float:
    """Return bootstrap weights of shape (draws, S); each row sums to 1."""
    return bootstrap_weights(n_samples, draws, np.random.default_rng(seed))


def rank_rows(
    policies: Sequence[Policy],
    predictions: Sequence[Sequence[Prediction]],
    info: ModelInfo,
    n_compressible: Sequence[int],
    weights: Float,
    calibration: Calibration | None = None,
    where: Where | None = None,
) -> list[Row]:
    """Aggregate over samples and rank.

    Parameters
    ----------
    policies : sequence of N Policy
    predictions : sequence of S sequences of N Prediction
    info : ModelInfo
    n_compressible : sequence of S int
        Layers of each sample that a policy applies to.
    weights : ndarray of shape (draws, S)
    calibration : Calibration, optional
        Adds the predicted accuracy, and ranks by it.
    where : Where, optional
        What the samples are of; needed with a calibration, which carries errors over within it.

    Returns
    -------
    list of Row
        By retention, then rank; yardsticks first and impossible configurations last within their budget.
    """
    # Two bytes for each number of a key and of a value, in all KV heads of the sample's compressible layers.
    entry_bytes = 2 * 2 * info.head_dim * info.n_kv_heads * np.asarray(n_compressible)
    rows = [_row(policy, [sample[i] for sample in predictions], entry_bytes, weights) for i, policy in enumerate(policies)]
    if calibration is not None and where is not None:
        _calibrate([row for row in rows if row.status == "ok"], calibration, where)
    budgets: dict[str, list[Row]] = {}
    for row in rows:
        if row.status == "ok" and not row.yardstick:
            # Without a budget, what brings the same number of entries is compared.
            budgets.setdefault(row.budget or f"{row.entries:.3f}", []).append(row)
    for group in budgets.values():
        losses = np.asarray([np.mean(row.loss) for row in group], dtype=np.float64)
        for row, loss in zip(group, losses, strict=True):
            row.rank = int((losses < loss).sum()) + 1
    able = [row for row in rows if row.status == "ok" and not row.yardstick]
    front = pareto_front(np.asarray([row.retention for row in able]), np.asarray([np.mean(row.loss) for row in able]))
    for row, on_front in zip(able, front, strict=True):
        row.pareto = bool(on_front)
    return sorted(rows, key=lambda r: (r.retention, r.status != "ok", r.rank or 0))


def risks(predictions: Sequence[Prediction]) -> Float:
    """Return the risk of one configuration on S prompts, `kvtool.calibration.risk`; evidence counts where all of them name it."""
    names = [name for name in ("harm", "evidence") if all(getattr(p, name) is not None for p in predictions)]
    return risk({name: np.asarray([getattr(p, name) for p in predictions], dtype=np.float64) for name in names})


def _row(policy: Policy, predictions: Sequence[Prediction], entry_bytes: NDArray[np.int64], weights: Float) -> Row:
    message = next((p.message for p in predictions if p.message), None)
    entries = np.asarray([p.entries for p in predictions])
    row = Row(
        policy=str(policy),
        method=method_key(policy),
        budget=None if policy.budget is None else str(policy.budget),
        retention=float(np.mean([p.retention for p in predictions])),
        entries=float(entries.mean()),
        status="impossible" if message else "ok",
        message=message,
        degenerate=any(p.degenerate for p in predictions),
        yardstick=policy.method.simulate_only,
        kv_bytes_fp16=round(float((entries * entry_bytes).mean())),
        note=next((p.note for p in predictions if p.note), None),
    )
    if not message:
        row.margin_change = float(np.mean([p.margin_change for p in predictions if p.margin_change is not None]))
        for name in KEPT:
            values = [getattr(p, name) for p in predictions]
            # Predictions that an older version wrote may lack a figure.
            if all(value is not None for value in values):
                # An answer of one token has no recall: NaN, so that the place of every sample stays.
                known = [value for value in values if not np.isnan(value)]
                setattr(row, name, float(np.mean(known)) if known else None)
                row.per_sample[name] = values
        losses = risks(predictions)
        both = np.stack([np.asarray(row.per_sample["harm"], dtype=np.float64), losses], axis=-1)
        low, high = np.quantile(weights @ both, [0.025, 0.975], axis=0).tolist()
        (row.harm_low, row.risk_low), (row.harm_high, row.risk_high) = low, high
        row.risk = float(losses.mean())
        row.per_sample["risk"] = losses.tolist()
    return row


def _calibrate(rows: Sequence[Row], calibration: Calibration, where: Where) -> None:
    if not rows:
        return
    names = [name for name in KEPT if all(name in row.per_sample for row in rows)]
    figures = {name: np.asarray([row.per_sample[name] for row in rows], dtype=np.float64) for name in names}
    shares = [row.retention for row in rows]
    predicted, confirmed = calibration.predict_policies(figures, where, [row.method for row in rows], shares)
    for row, values, own in zip(rows, predicted, confirmed.tolist(), strict=True):
        mean = float(values.mean())
        row.predicted, row.confirmed = min(max(mean, 0.0), 1.0), own
        if row.predicted != mean:
            beyond = f"predicted accuracy {mean:.2f} is shown as {row.predicted:.0f}, and ranked as it is"
            row.note = beyond if row.note is None else f"{row.note}; {beyond}"
        row.predicted_low, row.predicted_high = calibration.interval(row.predicted)
        row.per_sample["predicted"] = values.tolist()
