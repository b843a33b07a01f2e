"""Intervals, paired differences and rank correlation over samples.

Shapes: N configurations, S samples, D bootstrap draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from kvtool.bootstrap import bootstrap_weights

Float = NDArray[np.float64]

#: means of scores that differ by less are equal: resampling adds rounding noise of about 1e-16
TIE = 1e-9
#: bootstrap draws of an interval
DRAWS = 2000
#: pairs x draws that `tau_b` holds at once (8 bytes each, a few arrays)
_BLOCK = 1 << 22


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with its 95 % interval."""

    mean: float
    low: float
    high: float

    def text(self, digits: int = 2, sign: bool = False) -> str:
        """Return e.g. ``0.71 (0.65 to 0.78)``."""
        form = f"{'+' if sign else ''}.{digits}f"
        return f"{self.mean:{form}} ({self.low:{form}} to {self.high:{form}})"


@lru_cache(maxsize=8)
def shared_weights(n_samples: int, draws: int, seed: int) -> Float:
    """Return the bootstrap weights of a seed, shape (D, S), read-only: the same for all figures of the same prompts, and made once."""
    drawn = bootstrap_weights(n_samples, draws, np.random.default_rng(seed))
    drawn.flags.writeable = False
    return drawn


def percentile_interval(point: float, drawn: Float, n: int | None = None) -> Interval:
    """Return a point estimate with the 2.5 and 97.5 percentiles of its draws; NaN draws are left out.

    The interval always contains the point: rounding of equal values, or the bias of resampled orders, would push it out.

    Parameters
    ----------
    point : float
    drawn : ndarray of shape (D,)
    n : int, optional
        What was resampled, of a mean. The percentiles of `expanded_level` are taken then: those of few samples are too narrow.
    """
    known = drawn[~np.isnan(drawn)]
    if not len(known):
        return Interval(point, float("nan"), float("nan"))
    low, high = _ends(known, 0.025 if n is None else expanded_level(n))
    return Interval(point, min(low, point), max(high, point))


@lru_cache(maxsize=256)
def expanded_level(n: int) -> float:
    """Return the percentile at which a bootstrap mean of n samples covers 95 % (Hesterberg 2015, "expanded percentile").

    The spread of resampled means is that of n, not of n - 1, and knows no t: for normal values the returned level undoes both.
    0.0108 for 12 samples, 0.0225 for 100.
    """
    from scipy.stats import norm, t

    return float(norm.cdf(-np.sqrt(n / (n - 1)) * t.ppf(0.975, n - 1))) if n > 1 else 0.0


def _ends(drawn: Float, level: float = 0.025) -> tuple[float, float]:
    """Return the two percentiles, as ``np.quantile`` does: by one sort, as reports of many cells take them by the ten thousand."""
    ordered = np.sort(drawn)
    where = np.asarray([level, 1 - level]) * (len(ordered) - 1)
    below = where.astype(int)
    above = np.minimum(below + 1, len(ordered) - 1)
    low, high = ordered[below] + (where - below) * (ordered[above] - ordered[below])
    return float(low), float(high)


def mean_interval(values: Float, draws: int = DRAWS, seed: int = 0, binary: bool | None = None) -> Interval:
    """Return the mean of S values with a bootstrap interval.

    A figure that is 0 or 1 gets Wilson's interval instead: the bootstrap of identical values would claim certainty.

    Parameters
    ----------
    values : ndarray of shape (S,)
    draws, seed : int
    binary : bool, optional
        Whether the figure can only be 0 or 1; default: judged by the values.
    """
    if np.isin(values, (0.0, 1.0)).all() if binary is None else binary:
        return wilson_interval(int(values.sum()), len(values))
    return percentile_interval(float(values.mean()), shared_weights(len(values), draws, seed) @ values, len(values))


def wilson_interval(hits: float, n: float) -> Interval:
    """Return a proportion with Wilson's 95 % interval (Wilson 1927)."""
    z, p = 1.959963984540054, hits / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # The exact bounds of no and of all hits are 0 and 1; rounding must not move them.
    low = 0.0 if hits == 0 else max(0.0, float(centre - half))
    return Interval(p, low, 1.0 if hits == n else min(1.0, float(centre + half)))


def tau_b(x: Float, y: Float) -> Float:
    """Kendall's tau-b between the columns of `x` and `y`.

    Parameters
    ----------
    x, y : ndarray of shape (N, D)
        D pairs of N values; values closer than `TIE` are ties.

    Returns
    -------
    ndarray of shape (D,)
        NaN where one side is constant.
    """
    first, second = np.triu_indices(len(x), k=1)
    step = max(1, _BLOCK // max(1, len(first)))
    tau = np.full(x.shape[1], np.nan)
    for start in range(0, x.shape[1], step):
        part = slice(start, start + step)
        sx, sy = (_signs(v[first, part] - v[second, part]) for v in (x, y))
        scale = np.sqrt((sx != 0).sum(0) * (sy != 0).sum(0))
        np.divide((sx * sy).sum(0), scale, out=tau[part], where=scale > 0)
    return tau


def nan_mean(values: Float) -> Float:
    """Return the mean over the first axis, NaN left out; NaN where nothing is left."""
    known = ~np.isnan(values)
    count = known.sum(0)
    mean: Float = np.divide(np.where(known, values, 0.0).sum(0), count, out=np.full(values.shape[1:], np.nan), where=count > 0)
    return mean


def _signs(difference: Float) -> Float:
    return np.where(np.abs(difference) < TIE, 0.0, np.sign(difference))
