"""How far a label can be trusted: bootstrap over prompts, checked and if need be calibrated on prompts that it has not seen.

What a confidence promises: with this probability another set of as many prompts of this kind gives the head the same kind. It is
checked by splitting the prompts in two at random, many times: the labels and confidences of one half against the labels of the other.

Shapes: S prompts, L layers, Q heads, N pairs of a split and a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvtool.classify.features import HeadTable
from kvtool.classify.kinds import Float, Int, kind_of, kinds_of_all, weighted_means

#: prompts needed for a confidence at all, and for checking one: each half then still has enough
MIN_PROMPTS, MIN_CHECKED = 4, 8
#: below this confidence a head is unsure
SURE_FROM = 0.8
#: bins of the reliability diagram, of equal width
BINS = 10
#: calibration error above which the bootstrap's share is calibrated
CALIBRATE_ABOVE = 0.05
#: random splits in halves, and bootstrap draws in each
SPLITS, SPLIT_DRAWS = 50, 200
#: folds of heads for the cross-fitted calibration
FOLDS = 5


def bootstrap_confidence(table: HeadTable, rng: np.random.Generator, draws: int, size: int | None = None) -> Float | None:
    """Return the share of bootstrap draws over prompts that give each head its kind, ``(L, Q)``; None with too few prompts.

    A draw takes half as many prompts as there are, with replacement. The mean of such a draw strays from the mean of all prompts as far as
    the mean of another, equally large set of prompts does (both sets err, so the variance is twice that of one mean): the share
    estimates how often *another set* would agree, and not only how often this one agrees with itself. `size` takes another number.
    """
    n = table.n_prompts
    if n < MIN_PROMPTS:
        return None
    kinds, shares = kinds_of_all(table), np.zeros(table.sink.shape[1:])
    size = size or n // 2
    for start in range(0, draws, 100):
        count = min(100, draws - start)
        weights = rng.multinomial(size, np.full(n, 1 / n), size=count) / size
        shares += (kind_of(weighted_means(table, weights)) == kinds).sum(0)
    return np.asarray(shares / draws, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Pairs:
    """Confidences and what became of them, one entry per split and head.

    Attributes
    ----------
    confidence : ndarray of shape (splits, heads)
        Of the labels from one half of the prompts.
    agrees : ndarray of bool, (splits, heads)
        Whether the other half gives the head the same label.
    """

    confidence: Float
    agrees: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Reliability:
    """How confidences compare with what they promise.

    Attributes
    ----------
    n_splits, n_half : int
        Random splits, prompts in a half.
    ece : float
        Expected calibration error of the bootstrap's share: mean over all pairs of abs(agreement - confidence), by bin.
    ece_interval : tuple of float
        95 %, by bootstrap over heads.
    ece_contested : float or None
        The same over pairs with a confidence below 0.99 only: sure heads cannot hide a bad calibration here.
    ece_calibrated : float
        After isotonic regression, each head by a calibration fitted on other heads.
    calibrated : bool
        Whether the reported confidences are calibrated: the bootstrap's error was too large, and calibrating made it smaller.
    accuracy, mean_confidence : float
        Over all pairs: a constant confidence equal to the first would have no calibration error either.
    curve : tuple of dict
        Per bin: ``low``, ``high``, ``confidence``, ``agreement``, ``n``; for the bootstrap's share.
    """

    n_splits: int
    n_half: int
    ece: float
    ece_interval: tuple[float, float]
    ece_contested: float | None
    ece_calibrated: float
    calibrated: bool
    accuracy: float
    mean_confidence: float
    curve: tuple[dict[str, float | int], ...]


def split_pairs(
    table: HeadTable, rng: np.random.Generator, splits: int, draws: int, size: int | None = None, draw_size: int | None = None
) -> Pairs | None:
    """Compare the labels of two disjoint random sets of prompts, `splits` times; None with too few prompts.

    Parameters
    ----------
    table : HeadTable
    rng : numpy.random.Generator
    splits, draws : int
    size : int, optional
        Prompts of a set, at most half of all (the default). Two halves of one pool err in opposite directions; smaller sets
        of a large pool hardly do.
    draw_size : int, optional
        Prompts of a bootstrap draw, default half of a set.
    """
    n = table.n_prompts
    size = n // 2 if size is None else size
    if size < MIN_PROMPTS or 2 * size > n:
        return None
    confidence, agrees = [], []
    for _ in range(splits):
        order = rng.permutation(n)
        first, second = table.take(order[:size]), table.take(order[size : 2 * size])
        share = bootstrap_confidence(first, rng, draws, draw_size)
        assert share is not None  # a set holds MIN_PROMPTS
        confidence.append(share.flatten())
        agrees.append((kinds_of_all(first) == kinds_of_all(second)).flatten())
    return Pairs(np.asarray(confidence), np.asarray(agrees))


def calibration_error(confidence: Float, agrees: NDArray[np.bool_]) -> float:
    """Return the expected calibration error over `BINS` bins of equal width."""
    count, sums, hits = _bins(confidence, agrees)
    return float(np.abs(hits - sums).sum() / count.sum())


def _bins(confidence: Float, agrees: NDArray[np.bool_]) -> tuple[Int, Float, Float]:
    """Return per bin the number of pairs, the sum of confidences and the number that agree."""
    which = np.clip((confidence.flatten() * BINS).astype(np.int64), 0, BINS - 1)
    values = (np.ones(confidence.size), confidence.flatten(), agrees.flatten().astype(np.float64))
    count, sums, hits = (np.bincount(which, weights=v, minlength=BINS).astype(np.float64) for v in values)
    return count.astype(np.int64), sums, hits


def reliability(pairs: Pairs, n_half: int, rng: np.random.Generator) -> tuple[Reliability, Float]:
    """Judge confidences by what became of them.

    Returns
    -------
    Reliability
    ndarray of shape (splits, heads)
        Cross-fitted calibrated confidences.
    """
    crossed = cross_calibrate(pairs, rng)
    ece, after = calibration_error(pairs.confidence, pairs.agrees), calibration_error(crossed, pairs.agrees)
    heads = pairs.confidence.shape[1]
    draws = [rng.integers(0, heads, heads) for _ in range(500)]
    spread = [calibration_error(pairs.confidence[:, d], pairs.agrees[:, d]) for d in draws]
    low, high = np.quantile(spread, [0.025, 0.975])
    contested = pairs.confidence < 0.99
    some = calibration_error(pairs.confidence[contested], pairs.agrees[contested]) if contested.any() else None
    count, sums, hits = _bins(pairs.confidence, pairs.agrees)
    curve = tuple(
        {"low": b / BINS, "high": (b + 1) / BINS, "confidence": float(sums[b] / k), "agreement": float(hits[b] / k), "n": k}
        for b, k in enumerate(count.tolist())
        if k
    )
    judged = Reliability(
        n_splits=len(pairs.confidence),
        n_half=n_half,
        ece=ece,
        ece_interval=(min(ece, float(low)), max(ece, float(high))),
        ece_contested=some,
        ece_calibrated=after,
        calibrated=ece > CALIBRATE_ABOVE and after < ece,
        accuracy=float(pairs.agrees.mean()),
        mean_confidence=float(pairs.confidence.mean()),
        curve=curve,
    )
    return judged, crossed


def cross_calibrate(pairs: Pairs, rng: np.random.Generator) -> Float:
    """Calibrate by isotonic regression, each head by a fit on the heads of the other folds."""
    n_heads = pairs.confidence.shape[1]
    found, folds = pairs.confidence.copy(), rng.permutation(n_heads) % min(FOLDS, n_heads)
    for fold in range(folds.max() + 1):
        inside = folds == fold
        if inside.all():
            continue
        found[:, inside] = calibrate(Pairs(pairs.confidence[:, ~inside], pairs.agrees[:, ~inside]), pairs.confidence[:, inside])
    return found


def calibrate(pairs: Pairs, confidence: Float) -> Float:
    """Map confidences to the share of agreement that isotonic regression finds in the pairs."""
    from sklearn.isotonic import IsotonicRegression

    fit = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip")
    fit.fit(pairs.confidence.flatten(), pairs.agrees.flatten().astype(np.float64))
    return np.asarray(fit.predict(confidence.flatten()), dtype=np.float64).reshape(confidence.shape)
