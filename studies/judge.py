"""Whether one row of a study is better than another: by the same prompts, segments or repeats where there are any, and above the noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvtool.studies.noise import TIMES
from kvtool.studies.paired import Value, difference
from kvtool.studies.results import METRICS, ResultRow

#: Metric -> the same as a change from the full cache on the same samples or tokens.
PAIRED = {"score": "score_change", "accuracy": "accuracy_change", "perplexity": "perplexity_ratio"}
#: Figures that two policies have in common to the last digit only if they keep the same.
PRINTS = ("nll", "perplexity")
#: Metrics whose differences are shares of the worse one's.
RELATIVE = frozenset({*TIMES, "perplexity"})
#: Sizes: nobody is surprised that they differ with what is kept.
SIZES = frozenset({"kept", "kv_mb", "peak_mb", "effective_context", "efficiency"})
#: Differences that are rounding.
TINY = 1e-9
#: Shares of the larger one by which what two rows keep may differ before a finding says so.
UNEQUAL = 0.1
#: Pairs of times from which on their median has an interval; of fewer it is their smallest and largest.
MOST_REPEATS = 6


@dataclass(frozen=True, slots=True)
class Judged:
    """How two rows compare.

    Attributes
    ----------
    better, worse : ResultRow
        As the finding names them.
    size : int
        2: `better` is better beyond intervals and noise; 1: it is better; 0: equal; -1 and -2: the contrary.
    difference : Value or None
        The better way above 0; a share of 1 for metrics of `RELATIVE`. None without figures per prompt or repeat.
    same : bool
        They are one policy.
    floor : float or None
        Of times: the A/A floor that the difference had to exceed; None: not known.
    """

    better: ResultRow
    worse: ResultRow
    size: int
    difference: Value | None
    same: bool
    floor: float | None = None

    @property
    def unequal(self) -> tuple[float, float, str] | None:
        """What each of the two keeps, and its unit, where that is not about the same."""
        for metric, unit in (("effective_context", " entries"), ("kept", " %")):
            if metric in self.better.values and metric in self.worse.values:
                a, b = (row.values[metric].mean for row in (self.better, self.worse))
                return (a, b, unit) if abs(a - b) > UNEQUAL * max(a, b) else None
        return None


def judge(metric: str, better: ResultRow, worse: ResultRow, floor: float | None = None) -> Judged:
    """Compare two rows in a metric.

    Scores and accuracies: by their difference prompt by prompt. Perplexities: by their ratio on the same segments. Times: by their
    ratio prompt by prompt or repeat by repeat, which must lie beyond the A/A floor with its whole interval. Else by values.

    Parameters
    ----------
    metric : str
        Key of `kvtool.studies.results.METRICS`.
    better, worse : ResultRow
    floor : float, optional
        Of a time: relative distance of the same configuration, measured again, from itself. None: not known, so nothing is clear.
    """
    if is_same(better, worse):
        return Judged(better, worse, 0, None, True)
    found = _ratio(metric, better, worse) if metric in TIMES else _difference(metric, better, worse)
    if found is None:
        return Judged(better, worse, _by_values(metric, better, worse), None, False, floor)
    least = TINY
    if metric in TIMES:
        least = math.inf if floor is None else floor
    if abs(found.mean) <= TINY:
        return Judged(better, worse, 0, found, False, floor)
    # An interval that ends at the limit but for rounding does not exclude it.
    clear = found.low is not None and found.high is not None and (found.low > least or found.high < -least)
    return Judged(better, worse, (2 if clear else 1) * (1 if found.mean > 0 else -1), found, False, floor)


def is_same(first: ResultRow, second: ResultRow) -> bool:
    """Return whether two rows are one policy: by its text form, or as every figure but times is the same to the last digit."""
    if first is second or first.policy == second.policy:
        return True
    if not any(key in first.values and key in second.values for key in PRINTS):
        return False
    keys = (first.values.keys() | second.values.keys()) - TIMES.keys() - {"peak_mb", "kv_mb"}
    metrics = (first.samples.keys() | second.samples.keys()) - TIMES.keys()
    return all(_alike(first.values.get(key), second.values.get(key)) for key in keys) and all(
        _equal(first.samples.get(key, {}), second.samples.get(key, {})) for key in metrics
    )


def _alike(a: Value | None, b: Value | None) -> bool:
    return a is not None and b is not None and _close(a.mean, b.mean)


def _equal(a: Mapping[str, float], b: Mapping[str, float]) -> bool:
    return a.keys() == b.keys() and all(_close(a[key], b[key]) for key in a)


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-15)


def _sign(metric: str) -> float:
    return 1.0 if METRICS[metric].more is not False else -1.0


def _difference(metric: str, better: ResultRow, worse: ResultRow) -> Value | None:
    """How much better one is on the prompts or segments that both have; of perplexities the other's over its own - 1."""
    a, b = (row.samples.get(metric, {}) for row in (better, worse))
    reading = metric == "perplexity"
    found = difference(*((b, a) if _sign(metric) < 0 else (a, b)), better.documents, share=not reading)
    if found is None or not reading:
        return found
    return Value(math.expm1(found.mean), *(None if end is None else math.expm1(end) for end in (found.low, found.high)))


def _ratio(metric: str, better: ResultRow, worse: ResultRow) -> Value | None:
    """How much faster one is, as a share: the median over prompts or repeats, with its interval or its smallest and largest."""
    import numpy as np

    from kvtool.analysis.resampling import Documents, median_ratio

    pair = (better, worse) if _sign(metric) > 0 else (worse, better)
    a, b = (row.samples.get(metric, {}) for row in pair)
    if not (shared := [name for name in a if name in b]):
        x, y = (row.values[metric].mean for row in pair)
        return Value(x / y - 1) if x and y else None
    top, bottom = (np.asarray([values[name] for name in shared], dtype=np.float64) for values in (a, b))
    if len(shared) < MOST_REPEATS:
        ratios = top / bottom
        return Value(float(np.median(ratios)) - 1, float(ratios.min()) - 1, float(ratios.max()) - 1)
    found = median_ratio(top, bottom, Documents.apart(len(shared)), 1000)
    return Value(found.mean - 1, found.low - 1, found.high - 1)


def _by_values(metric: str, better: ResultRow, worse: ResultRow) -> int:
    paired = PAIRED.get(metric, metric)
    a, b = (row.values.get(paired, row.values[metric]) for row in (better, worse))
    gap = _sign(metric) * (a.mean - b.mean)
    if gap == 0:
        return 0
    size = 2 if abs(gap) > _half(a) + _half(b) and (_half(a) or _half(b)) else 1
    return size if gap > 0 else -size


def _half(value: Value) -> float:
    return 0.0 if value.low is None or value.high is None else (value.high - value.low) / 2


def verdict(metric: str, pairs: Sequence[Judged]) -> str:
    """Say what pairs come to.

    Returns
    -------
    str
        ``"agrees"``, ``"differs"``: clear pairs decide, of times only if they are most; each also with ``" (no intervals)"`` where no
        figure has one and all pairs point the same way. ``"not clear"``: within intervals or noise, or split. ``"same policy"``: nothing
        to decide. ``"not measured"``.
    """
    if not pairs:
        return "not measured"
    if all(pair.same for pair in pairs):
        return "same policy"
    sizes = [pair.size for pair in pairs]
    clear, wrong, right, n, equal = sizes.count(2), sizes.count(-2), sum(s > 0 for s in sizes), len(sizes), sizes.count(0)
    if metric in TIMES:
        return "agrees" if clear > n / 2 and not wrong else "differs" if wrong > n / 2 and not clear else "not clear"
    if not any(row.values[metric].low is not None for pair in pairs for row in (pair.better, pair.worse)):
        return "agrees (no intervals)" if right == n else "differs (no intervals)" if not right and not equal else "not clear"
    if clear and not wrong and right > (n - equal) / 2:
        return "agrees"
    return "differs" if wrong and not clear and right < (n - equal) / 2 else "not clear"
