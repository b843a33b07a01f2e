"""Intervals and tests that know documents: questions of one document are no independent samples.

Shapes: S samples, C documents (clusters).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvtool.analysis.statistics import DRAWS as MOST_DRAWS
from kvtool.analysis.statistics import TIE, Interval, percentile_interval, shared_weights, wilson_interval

Float = NDArray[np.float64]

#: resamples of permutation tests, and of the bootstrap where its method is asked for
DRAWS = 9999
#: of bootstrap intervals; the first is the one that every table of kvtool has
METHODS = ("expanded", "bca", "percentile")
#: What every table says of its intervals: one method for one question.
HOW = (
    "95 % intervals: Wilson for figures that are 0 or 1 and Bonett and Price for their paired differences, else the bootstrap over "
    "prompts with expanded percentiles"
)


@dataclass(frozen=True, slots=True)
class Documents:
    """Which document each sample is of.

    Attributes
    ----------
    of : ndarray of shape (S,), int
        0 ... C - 1.
    """

    of: NDArray[np.int64]

    @classmethod
    def named(cls, names: Sequence[str]) -> Documents:
        """Number documents by name."""
        numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
        return cls(np.asarray([numbers[name] for name in names], dtype=np.int64))

    @property
    def n(self) -> int:
        """C."""
        return int(self.of.max()) + 1 if len(self.of) else 0

    @property
    def single(self) -> bool:
        """Whether every sample is a document of its own."""
        return self.n == len(self.of)

    @classmethod
    def grouped(cls, names: Sequence[str]) -> Documents:
        """Number documents by name; if all samples are of one, each counts as its own: what is resampled then are its parts."""
        return cls.named(names) if len(set(names)) > 1 else cls.apart(len(names))

    @classmethod
    def apart(cls, n: int) -> Documents:
        """Every sample is a document of its own."""
        return cls(np.arange(n, dtype=np.int64))

    def at(self, which: NDArray[np.bool_] | NDArray[np.int64]) -> Documents:
        """Return the documents of some of the samples, numbered anew."""
        return Documents(np.unique(self.of[which], return_inverse=True)[1].astype(np.int64))

    def sums(self, values: Float) -> Float:
        """Return the sum of `values` in each document, (C,)."""
        return np.bincount(self.of, weights=values, minlength=self.n).astype(np.float64)


def mean_interval(
    values: Float,
    documents: Documents,
    *,
    binary: bool | None = None,
    method: str = METHODS[0],
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Return the mean over samples with a 95 % interval; whole documents are resampled.

    Figures that are 0 or 1 get Wilson's interval. With several samples a document its n is the effective one: n over the
    design effect, the variance with documents over that without; where all are 0 or all are 1, the number of documents.

    Parameters
    ----------
    values : ndarray of shape (S,)
    documents : Documents
    binary : bool, optional
        Whether the figure can only be 0 or 1; default: judged by the values.
    method : str
        ``"expanded"`` (see `kvtool.analysis.statistics.expanded_level`), ``"bca"`` (bias-corrected and accelerated) or ``"percentile"``.
    draws, seed : int
        ``"expanded"`` draws 2,000 times at most, the same for all figures.
    """
    if np.isin(values, (0.0, 1.0)).all() if binary is None else binary:
        n = effective_n(values, documents)
        return wilson_interval(float(values.mean()) * n, n)
    point = float(values.mean())
    if documents.n < 2:
        return Interval(point, float("nan"), float("nan"))
    sums, counts = documents.sums(values), documents.sums(np.ones(len(values)))
    if method == "expanded":
        weights = shared_weights(documents.n, min(draws, MOST_DRAWS), seed)
        return percentile_interval(point, (weights @ sums) / (weights @ counts), documents.n)
    low, high = _bootstrap(sums, counts, method, draws, seed)
    return Interval(point, min(low, point), max(high, point))


def _bootstrap(sums: Float, counts: Float, method: str, draws: int, seed: int) -> tuple[float, float]:
    """Bootstrap the ratio of sums: the mean over samples when whole documents are drawn."""
    from scipy.stats import bootstrap

    means = sums / counts
    if np.ptp(means) <= 1e-12 * max(1.0, float(np.abs(means).max())):
        return float(means[0]), float(means[0])

    def ratio(a: Float, b: Float, axis: int = -1) -> Float:
        found: Float = a.sum(axis) / b.sum(axis)
        return found

    name = {"bca": "BCa", "percentile": "percentile"}[method]
    rng = np.random.default_rng(seed)
    # In blocks: all resamples of a long run at once would take gigabytes.
    batch = max(1, (1 << 22) // len(sums))
    found = bootstrap(
        (sums, counts), ratio, paired=True, vectorized=True, method=name, n_resamples=draws, batch=batch, random_state=rng
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def effective_n(values: Float, documents: Documents) -> float:
    """Return how many independent samples figures are worth: n / design effect, at most n.

    The variance with documents is the linearised one of a ratio of sums (Cochran 1977, chapter 6), without finite-population
    correction. Where all values are the same it is the number of documents.
    """
    n, n_documents = len(values), documents.n
    if documents.single:
        return float(n)
    if np.ptp(values) <= TIE or n_documents < 2:
        return float(n_documents)
    residuals = documents.sums(values - values.mean())
    clustered = n_documents / (n_documents - 1) * float((residuals**2).sum()) / n**2
    simple = float(values.var()) / (n - 1)
    return float(min(n, n * simple / clustered)) if clustered > 0 else float(n)


def change_interval(
    values: Float,
    baseline: Float,
    documents: Documents | None = None,
    *,
    share: bool = True,
    method: str = METHODS[0],
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Return the mean of ``values - baseline``, of the same S samples, with a 95 % interval.

    Where both can only be 0 or 1 it is the adjusted Wald interval of paired proportions (Bonett and Price 2012): one sample is
    added to those won and one to those lost. Otherwise the bootstrap of `mean_interval`. A bootstrap of equal differences would
    claim certainty: they get the width of that interval with nothing won or lost, 2.8 / (n + 2) either way.

    Parameters
    ----------
    values, baseline : ndarray of shape (S,)
    documents : Documents, optional
        Default: every sample is a document of its own.
    share : bool
        The figure lies between 0 and 1, as scores do; losses do not, even if all values happen to.
    method : str
    draws, seed : int
        See `mean_interval`.
    """
    documents = documents or Documents.apart(len(values))
    difference = values - baseline
    if np.isin(values, (0.0, 1.0)).all() and np.isin(baseline, (0.0, 1.0)).all():
        n = effective_n(difference, documents)
        return _of_counts(float(difference.mean()), n * float((difference > 0).mean()), n * float((difference < 0).mean()), n)
    found = mean_interval(difference, documents, binary=False, method=method, draws=draws, seed=seed)
    inside = share and min(values.min(), baseline.min()) >= 0 and max(values.max(), baseline.max()) <= 1
    if not inside or documents.n < 2 or np.ptp(difference) > TIE:
        return found
    equal = _of_counts(0.0, 0.0, 0.0, documents.n)
    return Interval(found.mean, max(-1.0, found.mean + equal.low), min(1.0, found.mean + equal.high))


def _of_counts(mean: float, won: float, lost: float, n: float) -> Interval:
    """Return the difference of two paired proportions with its interval, from how many of n samples are won and lost."""
    up, down = (won + 1) / (n + 2), (lost + 1) / (n + 2)
    half = 1.959963984540054 * float(np.sqrt((up + down - (up - down) ** 2) / (n + 2)))
    return Interval(mean, max(-1.0, min(up - down - half, mean)), min(1.0, max(up - down + half, mean)))


def paired_p(differences: Float, documents: Documents, draws: int = DRAWS, seed: int = 0) -> float:
    """Return the two-sided p-value of "no difference on average", from paired differences of S samples.

    The signs of whole documents are flipped at random: under the null a document's difference is as likely the other way
    round. Where every document's sum is the same size or zero (0/1 scores, a sample a document) this is McNemar's exact
    test, and is computed as such. Otherwise all sign patterns are taken if there are no more than `draws`, else that many.

    Parameters
    ----------
    differences : ndarray of shape (S,)
    documents : Documents
    draws, seed : int
    """
    from scipy.stats import binomtest, permutation_test

    sums = documents.sums(differences)
    sums = sums[np.abs(sums) > 1e-12]
    if not len(sums):
        return 1.0
    if np.ptp(np.abs(sums)) <= 1e-12:
        return float(binomtest(int((sums > 0).sum()), len(sums), 0.5).pvalue)

    def total(x: Float, axis: int = -1) -> Float:
        found: Float = x.sum(axis)
        return found

    batch = max(1, (1 << 22) // len(sums))
    found = permutation_test(
        (sums,), total, permutation_type="samples", vectorized=True, n_resamples=draws, batch=batch,
        random_state=np.random.default_rng(seed),
    )  # fmt: skip
    return min(1.0, float(found.pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values (Holm 1979): with k tests, the i-th smallest is multiplied by k - i + 1, in order."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def median_ratio(values: Float, baseline: Float, documents: Documents, draws: int = 2000, seed: int = 0) -> Interval:
    """Return the median over samples of ``values / baseline`` with a percentile interval; whole documents are resampled."""
    ratios = values / baseline
    point = float(np.median(ratios))
    if documents.n < 2:
        return Interval(point, float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(documents.of == c) for c in range(documents.n)]
    drawn = [
        float(np.median(ratios[np.concatenate([members[c] for c in rng.integers(0, documents.n, documents.n)])]))
        for _ in range(draws)
    ]
    return percentile_interval(point, np.asarray(drawn))
