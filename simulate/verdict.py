"""Settings judged on prompts that the search never saw: paired differences, what cannot be told apart, and the words for it.

Shapes: N settings, S prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtool.simulate.shortlist import MIN_PROMPTS, not_clearly_worse

Float = NDArray[np.float64]

BETTER, WORSE = "better than the defaults", "worse than the defaults: what the search found does not hold"
UNCLEAR, SAME = "not distinguishable from the defaults", "these are the defaults"
FEW, ALONE = "too few held-out prompts to tell", "the defaults cannot run at this budget"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was chosen for one budget, and how it does on held-out prompts.

    Attributes
    ----------
    budget, policy : str
    default : str or None
        The method's own values, moved into the space; None if they cannot run at this budget.
    searched, default_searched : float (None without a default)
        Mean risk or harm on the prompts of the search.
    held_out, default_held_out : float or None
        The same on the others; None if it cannot run on one of them.
    difference, low, high : float
        Held-out risk or harm of the policy minus that of the default, and its 95 % interval, paired; negative is better.
    verdict : str
    tied : tuple of str
        Settings that the search's prompts do not tell from the best one, without the chosen one, the best first.
    n_tied : int
    best : str
        The best on the prompts of the search, where something simpler was chosen.
    reason : str
        Why this one.
    retention : float
        What it keeps of the prompts of the search.
    note : str or None
        What the predicted figures leave out.
    """

    budget: str
    policy: str
    default: str | None
    searched: float
    default_searched: float | None
    held_out: float | None
    default_held_out: float | None
    difference: float | None
    low: float | None
    high: float | None
    verdict: str
    tied: tuple[str, ...]
    n_tied: int
    best: str
    reason: str
    retention: float
    note: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return JSON and YAML values."""
        return {**asdict(self), "tied": list(self.tied)}


def split_prompts(n: int, seed: int) -> tuple[list[int], list[int]]:
    """Return which of n prompts are searched on and which are held out: halves at random, the odd one is searched on."""
    order = np.random.default_rng(seed).permutation(n)
    cut = (n + 1) // 2
    return sorted(order[:cut].tolist()), sorted(order[cut:].tolist())


def tied_with_best(loss: Float, weights: Float) -> list[int]:
    """Return the settings that are not clearly worse than the best one, the best first.

    Parameters
    ----------
    loss : ndarray of shape (N, S)
        Risk or harm. NaN rows are impossible settings.
    weights : ndarray of shape (draws, S)
        Bootstrap weights.
    """
    means = loss.mean(axis=1)
    order = [int(i) for i in np.argsort(means, kind="stable") if not np.isnan(means[i])]
    return [i for i in order if not_clearly_worse(loss[i] - loss[order[0]], weights)]


def compare(chosen: Sequence[float], default: Sequence[float], weights: Float) -> tuple[float, float, float]:
    """Return the mean paired difference and its 95 % bootstrap interval."""
    difference = np.asarray(chosen, dtype=np.float64) - np.asarray(default, dtype=np.float64)
    low, high = np.quantile(weights @ difference, [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)


def words(interval: tuple[float, float, float] | tuple[None, None, None], n_prompts: int, *, same: bool) -> str:
    """Return what a difference with its interval (`compare`) says, in plain words."""
    _, low, high = interval
    if same:
        return SAME
    if low is None or high is None:
        return ALONE
    if n_prompts < MIN_PROMPTS:
        return f"{FEW} ({n_prompts})"
    return BETTER if high < 0 else WORSE if low > 0 else UNCLEAR
