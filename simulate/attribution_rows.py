"""All prompts together: what compensation costs per budget and block, why, and where it helps; with intervals over prompts.

Shapes: S prompts, D bootstrap draws, L layers, H KV heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kvtool.simulate.attribution import CAUSES, COUNTED, EVICT, FEWER, LADDER, N_SETS, PLAIN, STEPS, shapley
from kvtool.simulate.attribution_sample import WEIGHTED
from kvtool.simulate.curves import Float
from kvtool.simulate.gate import fit_gate

if TYPE_CHECKING:
    from kvtool.simulate.attribution_sample import SampleCells

#: What a user can really run: name -> state.
REAL = {"evict": EVICT, "fewer": FEWER, "mean": PLAIN, "count": COUNTED, "weighted": WEIGHTED}
#: Compensations that could help.
REMEDIES = ("count", "weighted")
#: What losses and causes can be counted in, and what it is called.
MEASURES = {"margin": "lost margin", "harm": "harm"}


@dataclass(frozen=True, slots=True)
class Estimate:
    """Mean over prompts and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def text(self, digits: int = 2) -> str:
        """Return e.g. ``+0.71 (+0.65 to +0.78)``."""
        return f"{self.mean:+.{digits}f} ({self.low:+.{digits}f} to {self.high:+.{digits}f})"


def estimate(values: Float, weights: Float) -> Estimate:
    """Return the mean of S values with its interval, widened to hold it.

    Parameters
    ----------
    values : ndarray of shape (S,)
    weights : ndarray of shape (D, S)
    """
    mean = float(values.mean())
    low, high = np.quantile(weights @ values, [0.025, 0.975])
    return Estimate(mean, min(float(low), mean), max(float(high), mean))


@dataclass(slots=True)
class Row:
    """One budget with one block size.

    Attributes
    ----------
    policy, block : str
    message : str or None
        Why it is impossible; all that follows is then empty.
    entries, slots : float
        Entries per KV head, and the representatives among them; means over prompts, layers and heads.
    moved : float
        Entries that the budget rule had to move between heads to make room for slots, mean over prompts.
    measure : str
        ``"margin"`` or ``"harm"``: what `loss` to `sets` are in, called cost below.
    harm, margin, mass : dict of str to float
        Harm, lost margin (sums over heads) and relative error of the softmax's denominator (mean), per thing that can be run.
    loss : dict of str to Estimate
        Cost above evicting alone, of the plain mean and the remedies.
    given : dict of str to Estimate
        What representatives give for slots that are there anyway: the cost with the slots left empty less that with them.
    causes : dict of str to Estimate
        Shapley values of the four flaws; they add up to the cost of the plain mean.
    mended : dict of str to Estimate
        What the plain mean's cost would fall by if this flaw alone were mended.
    ladder : dict of str to Estimate
        Steps from evicting alone to the plain mean; they add up to its loss.
    gap, held_plain, held_counted : float
        ``ln`` of the mass that a count bias still lacks, weighted by mass; share of the evicted mass that representatives have,
        without and with that bias.
    gates : dict of str to dict
        Per remedy: threshold, share of heads that pass, loss on the prompts it was fitted on and on others.
    heads : list of dict
        The same per KV head.
    sets : list of float
        Cost of the 16 sets of flaws.
    real : dict or None
        Masked forwards, see `real_figures`.
    """

    policy: str
    block: str
    message: str | None = None
    entries: float = 0.0
    slots: float = 0.0
    moved: float = 0.0
    measure: str = "margin"
    harm: dict[str, float] = field(default_factory=dict)
    margin: dict[str, float] = field(default_factory=dict)
    mass: dict[str, float] = field(default_factory=dict)
    loss: dict[str, Estimate] = field(default_factory=dict)
    given: dict[str, Estimate] = field(default_factory=dict)
    causes: dict[str, Estimate] = field(default_factory=dict)
    mended: dict[str, Estimate] = field(default_factory=dict)
    ladder: dict[str, Estimate] = field(default_factory=dict)
    gap: float = 0.0
    held_plain: float = 0.0
    held_counted: float = 0.0
    gates: dict[str, dict[str, Any]] = field(default_factory=dict)
    heads: list[dict[str, Any]] = field(default_factory=list)
    sets: list[float] = field(default_factory=list)
    real: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    @property
    def label(self) -> str:
        """Policy and block in short."""
        return f"{self.policy}, block {self.block}"

    @property
    def cost(self) -> dict[str, float]:
        """What each thing that can be run costs, in the row's measure."""
        found: dict[str, float] = getattr(self, self.measure)
        return found


def make_row(
    policy: str,
    block: str,
    samples: Sequence[SampleCells],
    n: int,
    layers: Sequence[int],
    weights: Float,
    measure: str = "margin",
) -> Row:
    """Sum up cell `n` of all prompts.

    Parameters
    ----------
    policy, block : str
    samples : sequence of S SampleCells
    n : int
    layers : sequence of L int
        Numbers of the compressible layers.
    weights : ndarray of shape (D, S)
        Bootstrap weights.
    measure : str
        See `MEASURES`.
    """
    by_measure = {name: np.stack([getattr(s.measures, name)[n] for s in samples]) for name in ("harm", "margin", "mass")}
    cost = by_measure[measure]
    total = cost.sum(axis=(2, 3))
    parts = shapley(total[:, :N_SETS])
    budget, kept = (np.stack([getattr(s, name)[n] for s in samples]) for name in ("budget", "kept"))
    block_mass = {name: np.stack([getattr(s.mass, name)[n] for s in samples]) for name in ("exact", "plain", "counted", "gap")}
    row = Row(policy, block, entries=float(budget.mean()), slots=float((budget - kept).mean()), measure=measure)
    row.moved = float(np.mean([s.moved[n] for s in samples]))
    for name, state in REAL.items():
        row.harm[name] = float(by_measure["harm"][:, state].sum(axis=(1, 2)).mean())
        row.margin[name] = float(by_measure["margin"][:, state].sum(axis=(1, 2)).mean())
        row.mass[name] = float(by_measure["mass"][:, state].mean())
    row.loss = {name: estimate(total[:, REAL[name]] - total[:, EVICT], weights) for name in ("mean", *REMEDIES)}
    row.given = {name: estimate(total[:, FEWER] - total[:, REAL[name]], weights) for name in row.loss}
    row.causes = {cause: estimate(parts[:, i], weights) for i, cause in enumerate(CAUSES)}
    row.mended = {cause: estimate(total[:, PLAIN] - total[:, PLAIN & ~(1 << i)], weights) for i, cause in enumerate(CAUSES)}
    rises = np.diff(total[:, LADDER], axis=1)
    row.ladder = {step: estimate(rises[:, i], weights) for i, step in enumerate(STEPS)}
    row.gap, row.held_plain, row.held_counted = _shares({name: float(found.sum()) for name, found in block_mass.items()})
    row.sets = total[:, :N_SETS].mean(axis=0).tolist()
    variance = np.stack([s.variance[n] for s in samples])
    row.gates = _gates(cost, variance, weights)
    row.heads = _heads(cost, block_mass, variance, layers, weights)
    return row


def _shares(mass: dict[str, float]) -> tuple[float, float, float]:
    """Return the gap after ln n and the shares of the mass that representatives have; 0, 1, 1 where nothing was evicted."""
    if mass["exact"] <= 0:
        return 0.0, 1.0, 1.0
    return mass["gap"] / mass["exact"], mass["plain"] / mass["exact"], mass["counted"] / mass["exact"]


def _gates(cost: Float, variance: Float, weights: Float) -> dict[str, dict[str, Any]]:
    """Fit a gate per remedy on the cost (S, states, L, H); nothing where the capture has no variance of such blocks."""
    if np.isnan(variance).any():
        return {}
    found = {}
    for name in REMEDIES:
        loss = (cost[:, REAL[name]] - cost[:, EVICT]).reshape(len(cost), -1)
        gate = fit_gate(variance.reshape(len(cost), -1), loss)
        found[name] = {
            "option": gate.option(),
            "threshold": gate.threshold if np.isfinite(gate.threshold) else None,
            "open": gate.open,
            "fitted": gate.fitted,
            "held_out": None if gate.held_out is None else estimate(gate.held_out, weights),
        }
    return found


def _heads(
    cost: Float, block_mass: dict[str, Float], variance: Float, layers: Sequence[int], weights: Float
) -> list[dict[str, Any]]:
    parts = shapley(np.moveaxis(cost[:, :N_SETS], 1, -1)).mean(axis=0)
    rows = []
    for i, layer in enumerate(layers):
        for h in range(cost.shape[3]):
            own = cost[:, :, i, h]
            loss = {name: estimate(own[:, REAL[name]] - own[:, EVICT], weights) for name in ("mean", *REMEDIES)}
            gap, plain, counted = _shares({name: float(found[:, i, h].sum()) for name, found in block_mass.items()})
            rows.append(
                {
                    "layer": layer,
                    "head": h,
                    "cost": {name: float(own[:, state].mean()) for name, state in REAL.items()},
                    "causes": {cause: float(parts[i, h, k]) for k, cause in enumerate(CAUSES)},
                    "loss": loss,
                    "helps": [name for name in REMEDIES if loss[name].high < 0],
                    "hurts": [name for name in REMEDIES if loss[name].low > 0],
                    "gap": gap,
                    "held_plain": plain,
                    "held_counted": counted,
                    "variance": None if np.isnan(variance[:, i, h]).any() else float(variance[:, i, h].mean()),
                }
            )
    return rows


def real_figures(nll: Float, accuracy: Float, predicted: dict[str, float], weights: Float) -> dict[str, Any]:
    """Sum up masked forwards of one cell.

    Parameters
    ----------
    nll, accuracy : ndarray of shape (S, WEIGHTED + 2)
        Of the answer, in every state and, last, with the full cache.
    predicted : dict of str to float
        Predicted cost of what can be run, keys of `REAL`.
    weights : ndarray of shape (D, S)

    Returns
    -------
    dict
        ``nll`` and ``accuracy`` per thing that can be run and with the full cache; ``loss``, ``given`` and ``causes`` as in `Row`,
        in nll (the causes add up to the nll above that of the full cache); ``points``: accuracy above that of evicting alone;
        ``sure`` pairs of what can be run whose nll differs for sure, and how many of these lie ``as_predicted``.
    """
    parts = shapley(nll[:, :N_SETS])
    names = list(REAL)
    sure = agreed = 0
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            difference = estimate(nll[:, REAL[one]] - nll[:, REAL[other]], weights)
            if difference.low > 0 or difference.high < 0:
                sure += 1
                agreed += (difference.mean > 0) == (predicted[one] > predicted[other])
    states, others = {"full": -1} | REAL, ("fewer", "mean", *REMEDIES)
    return {
        "nll": {name: float(nll[:, state].mean()) for name, state in states.items()},
        "accuracy": {name: float(accuracy[:, state].mean()) for name, state in states.items()},
        "loss": {name: estimate(nll[:, REAL[name]] - nll[:, EVICT], weights) for name in others},
        "given": {name: estimate(nll[:, FEWER] - nll[:, REAL[name]], weights) for name in ("mean", *REMEDIES)},
        "points": {name: estimate(accuracy[:, REAL[name]] - accuracy[:, EVICT], weights) for name in others},
        "causes": {cause: estimate(parts[:, i], weights) for i, cause in enumerate(CAUSES)},
        "sure": sure,
        "as_predicted": agreed,
    }
