"""Rows of `kvtool analyze gaps`: parts of a configuration's loss with intervals, and the price of every shape.

Shapes: S prompts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtool.policies import Policy
from kvtool.policies.text import method_key
from kvtool.simulate.gaps import PARTS, Gaps, Part

Float = NDArray[np.float64]
#: Parts are named until they explain this share of the loss.
MOST = 0.8
#: Losses below this, in harm, are rounding: there is nothing to explain.
NOTHING = 1e-9


@dataclass(frozen=True, slots=True)
class Figure:
    """A mean over prompts with its 95 % bootstrap interval, budgets held."""

    mean: float
    low: float
    high: float


def figure_of(values: Float, weights: Float) -> Figure:
    """Return mean and interval of values per prompt, (S,), by bootstrap weights, (draws, S)."""
    low, high = np.quantile(weights @ values, [0.025, 0.975])
    return Figure(float(values.mean()), float(low), float(high))


@dataclass(slots=True)
class GapRow:
    """One configuration.

    Attributes
    ----------
    policy, method : str
        Text form; the same without the budget.
    budget : str or None
    retention, entries : float
        Means over prompts of what it keeps.
    shape : str
        The tightest shape that its budgets always have.
    status : str
        ``"ok"``, or ``"impossible"`` with `message`.
    yardstick : bool
        No real run can have it (``oracle``).
    adapts : bool
        Its budgets differ among prompts; best budgets are the same for all, so its allocation gap may be negative.
    harm, oracle, loss : Figure or None
        Of the policy, of the oracle with the best free budgets, and their difference.
    parts : dict of str to Figure
        Sum to `loss`.
    explains : list of str
        The largest parts, until they explain 80 % of the loss.
    slack : float
        See `kvtool.simulate.gaps.Gaps`.
    scaled : bool
        Prompts or totals differ, so best budgets are scaled from the longest prompt's.
    per_sample : dict of str to list of float
        ``harm`` and the harms of the steps to the oracle.
    """

    policy: str
    method: str
    budget: str | None
    retention: float
    entries: float
    shape: str
    status: str = "ok"
    message: str | None = None
    yardstick: bool = False
    degenerate: bool = False
    adapts: bool = False
    harm: Figure | None = None
    oracle: Figure | None = None
    loss: Figure | None = None
    parts: dict[Part, Figure] = field(default_factory=dict)
    explains: list[Part] = field(default_factory=list)
    slack: float = 0.0
    scaled: bool = False
    per_sample: dict[str, list[float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    def share(self, part: Part) -> float:
        """Return the part's share of the loss; 0 where nothing is lost."""
        return self.parts[part].mean / self.loss.mean if self.loss and abs(self.loss.mean) > NOTHING else 0.0


def start_row(policy: Policy, entries: Float, seq_lens: Float, shape: str) -> GapRow:
    """Return a row without figures."""
    return GapRow(
        policy=str(policy),
        method=method_key(policy),
        budget=None if policy.budget is None else str(policy.budget),
        retention=float(np.mean(entries / seq_lens)),
        entries=float(entries.mean()),
        shape=shape,
        yardstick=policy.method.simulate_only,
        degenerate=any(policy.is_degenerate(int(n)) for n in seq_lens),
    )


def fill_row(row: GapRow, gaps: Gaps, weights: Float) -> None:
    """Put the figures in.

    Parameters
    ----------
    weights : ndarray of shape (draws, S)
        Bootstrap weights; the same for all rows, so that differences of rows are paired.
    """
    parts = gaps.parts()
    row.harm, row.oracle = figure_of(gaps.harm, weights), figure_of(gaps.oracle, weights)
    row.loss = figure_of(gaps.harm - gaps.oracle, weights)
    row.parts = {name: figure_of(values, weights) for name, values in parts.items()}
    row.explains = largest_parts({name: part.mean for name, part in row.parts.items()})
    row.adapts, row.scaled, row.slack = gaps.adapts, not gaps.same, gaps.slack
    names = ("harm", "in_shape", "free", "protected", "oracle")
    row.per_sample = {name: getattr(gaps, name).tolist() for name in names}


def largest_parts(means: dict[Part, float]) -> list[Part]:
    """Return the largest parts until they explain `MOST` of their sum; none where nothing is lost."""
    loss, found, sum_ = sum(means.values()), [], 0.0
    if loss <= NOTHING:
        return []
    for name in sorted(PARTS, key=lambda name: -means[name]):
        found.append(name)
        sum_ += means[name]
        if sum_ >= MOST * loss:
            break
    return found


@dataclass(frozen=True, slots=True)
class ShapeRow:
    """The least harm of every shape under one ranking at one total.

    Attributes
    ----------
    scorer : str
        Method whose ranking and protection it is, without a budget.
    budget : str
    retention : float
    harm : dict of str to float
        Mean harm of the best budgets by shape. For ``rank1`` the least that was found.
    """

    scorer: str
    budget: str
    retention: float
    harm: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)
