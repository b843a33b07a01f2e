"""Importances of heads side by side: means, ranks and rank correlations, and how they change under compression (HIV).

Shapes: S prompts, N heads of all compared layers, D bootstrap draws.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtool.analysis.statistics import Interval, percentile_interval, tau_b
from kvtool.bootstrap import bootstrap_weights
from kvtool.errors import DataError
from kvtool.files import read_records

Float = NDArray[np.float64]

#: measures in the order of tables
MEASURES = ("attention", "reasoning", "gain", "ablation", "ablation_margin")
LEVELS = ("kv_heads", "heads")
#: share of the heads that count as top, and how many at least
TOP_SHARE, TOP_LEAST = 0.1, 2
#: random splits into halves
SPLITS = 200
#: heads above which Kendall's tau is computed by sorting, head pair by head pair below
_MANY = 200


@dataclass(frozen=True, slots=True)
class Level:
    """Importances of all prompts, of KV heads or of query heads.

    Attributes
    ----------
    layers : tuple of int
        Layers that all prompts can compress.
    n_heads : int
        Of one layer.
    values : dict of str to ndarray of shape (S, N)
        Layer-major; NaN on prompts that do not have the measure.
    """

    layers: tuple[int, ...]
    n_heads: int
    values: dict[str, Float]

    @property
    def places(self) -> list[tuple[int, int]]:
        """Layer and head of each of the N."""
        return [(layer, head) for layer in self.layers for head in range(self.n_heads)]

    @property
    def n_top(self) -> int:
        """How many heads count as top."""
        n = len(self.layers) * self.n_heads
        return min(n, max(TOP_LEAST, round(TOP_SHARE * n)))


@dataclass(frozen=True, slots=True)
class Pair:
    """How two measures agree over the heads, each averaged over its prompts.

    Attributes
    ----------
    a, b : str
        Equal: the same measure on two random halves of the prompts, mean and 2.5 and 97.5 percentiles of the splits.
    spearman, kendall, overlap : Interval
        Rank correlations; share of the top heads that both name.
    """

    a: str
    b: str
    spearman: Interval
    kendall: Interval
    overlap: Interval


@dataclass(frozen=True, slots=True)
class Changed:
    """One measure under one policy.

    Attributes
    ----------
    policy, measure, level : str
    retention : float
        Mean over prompts of what the policy keeps.
    message : str or None
        Why there are no figures.
    figures : dict of str to float
        Loss, margin and accuracy under the policy, means over prompts.
    variance, ratio, spread : Interval or None
        Variance over heads; over that with the full cache; standard deviation over mean.
    spearman, kendall, overlap : Interval or None
        Agreement with the full cache's.
    """

    policy: str
    measure: str
    level: str
    retention: float
    message: str | None
    figures: dict[str, float]
    variance: Interval | None = None
    ratio: Interval | None = None
    spread: Interval | None = None
    spearman: Interval | None = None
    kendall: Interval | None = None
    overlap: Interval | None = None


def collect(records: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Level]:
    """Put the records of several sources together, prompt by prompt.

    Parameters
    ----------
    records : sequence of sequences of dict
        Each source has one record per prompt: ``sample``, ``layers`` and ``measures``. The first source decides the prompts.

    Returns
    -------
    dict
        ``kv_heads`` and ``heads``; only measures that some prompt has, and that the level has.

    Raises
    ------
    DataError
        A source lacks prompts, or no layer can be compressed on all of them.
    """
    ids = [record["sample"] for record in records[0]]
    sources = [{record["sample"]: record for record in source} for source in records]
    if any(missing := [set(ids) - set(source) for source in sources]):
        raise DataError(
            f"importance: {len(set().union(*missing))} prompts are not measured; run the same command again, it continues"
        )
    shared = set.intersection(*(set(source[i]["layers"]) for source in sources for i in ids))
    if not shared:
        raise DataError("importance: no layer can be compressed on all prompts; capture prompts of one length")
    layers = tuple(sorted(shared))
    return {level: _level(level, ids, sources, layers) for level in LEVELS}


def _level(level: str, ids: Sequence[str], sources: Sequence[dict[str, Any]], layers: tuple[int, ...]) -> Level:
    values: dict[str, Float] = {}
    n_heads = 0
    for name in MEASURES:
        for source in sources:
            rows = [_row(source[i], name, level, layers) for i in ids]
            width = max((len(row) for row in rows if row is not None), default=0)
            if width:
                n_heads = width // len(layers)
                values[name] = np.asarray([np.full(width, np.nan) if row is None else row for row in rows])
    return Level(layers, n_heads, values)


def _row(record: dict[str, Any], measure: str, level: str, layers: tuple[int, ...]) -> Float | None:
    table = record["measures"].get(measure, {}).get(level)
    if table is None:
        return None
    at = [record["layers"].index(layer) for layer in layers]
    return np.asarray(table, dtype=np.float64)[at].flatten()


def averages(values: Float, drawn: Float) -> Float:
    """Return weighted means over the prompts that have the measure, (D, N); NaN for a draw without any."""
    known = ~np.isnan(values[:, 0])
    total = drawn[:, known].sum(1, keepdims=True)
    sums = drawn[:, known] @ values[known]
    found: Float = np.divide(sums, total, out=np.full(sums.shape, np.nan), where=total > 0)
    return found


def spearman(x: Float, y: Float) -> Float:
    """Return Spearman's rank correlation of each row of two (D, N) tables; NaN where one is constant or unknown."""
    from scipy.stats import rankdata

    a, b = (rankdata(_rounded(v), axis=1, nan_policy="propagate") for v in (x, y))
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    scale = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    found: Float = np.divide((a * b).sum(1), scale, out=np.full(len(a), np.nan), where=scale > 0)
    return found


def kendall(x: Float, y: Float) -> Float:
    """Return Kendall's tau-b of each row of two (D, N) tables; NaN where one is constant or unknown."""
    a, b = _rounded(x), _rounded(y)
    known = ~(np.isnan(a).any(1) | np.isnan(b).any(1))
    found = np.full(len(a), np.nan)
    if a.shape[1] <= _MANY:
        found[known] = tau_b(a[known].T, b[known].T)
        return found
    from scipy.stats import kendalltau

    found[known] = [kendalltau(p, q).statistic for p, q in zip(a[known], b[known], strict=True)]
    return found


def _rounded(values: Float) -> Float:
    """Scale each row to a largest magnitude of 1 and round, so that equal importances tie whatever their unit."""
    top = np.abs(values).max(1, keepdims=True)
    scaled: Float = np.round(np.divide(values, top, out=values.copy(), where=top > 0), 9)
    return scaled


def overlap(x: Float, y: Float, k: int) -> Float:
    """Return the share of the `k` largest of each row of `x` that are among those of `y`; equal values: the earlier head."""
    chosen = []
    for table in (x, y):
        top = np.zeros(table.shape, dtype=bool)
        np.put_along_axis(top, np.argsort(-_rounded(table), axis=1, kind="stable")[:, :k], True, axis=1)
        chosen.append(top)
    unknown = np.isnan(x).any(1) | np.isnan(y).any(1)
    return np.where(unknown, np.nan, (chosen[0] & chosen[1]).sum(1) / k)


def agreement(a: Float, b: Float, k: int) -> list[Interval]:
    """Return Spearman, Kendall and top-`k` overlap; the first rows are the point estimates, the others draws."""
    columns = (spearman(a, b), kendall(a, b), overlap(a, b, k))
    return [percentile_interval(float(column[0]), column[1:]) for column in columns]


def with_point(n_samples: int, draws: int, seed: int) -> Float:
    """Return bootstrap weights, (1 + draws, S): equal weights first."""
    rng = np.random.default_rng(seed)
    return np.concatenate([np.full((1, n_samples), 1 / n_samples), bootstrap_weights(n_samples, draws, rng)])


def compare(level: Level, draws: int, seed: int) -> list[Pair]:
    """Compare all pairs of measures on the same draws of prompts, then each with itself on other prompts."""
    n_samples = len(next(iter(level.values.values())))
    drawn = with_point(n_samples, draws, seed)
    means = {name: averages(values, drawn) for name, values in level.values.items()}
    pairs = [Pair(a, b, *agreement(means[a], means[b], level.n_top)) for a, b in combinations(means, 2)]
    return pairs + [pair for name, values in level.values.items() if (pair := _halves(name, values, level.n_top, seed))]


def _halves(name: str, values: Float, k: int, seed: int) -> Pair | None:
    known = values[~np.isnan(values[:, 0])]
    half = len(known) // 2
    if half < 2:
        return None
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(known)) for _ in range(SPLITS)]
    first, second = (np.asarray([known[order[part]].mean(0) for order in orders]) for part in (slice(half), slice(half, None)))
    found = []
    for column in (spearman(first, second), kendall(first, second), overlap(first, second, k)):
        mean = float("nan") if np.isnan(column).all() else float(np.nanmean(column))
        found.append(percentile_interval(mean, column))
    return Pair(name, name, *found)


def changes(records: Sequence[dict[str, Any]], draws: int, seed: int) -> list[Changed]:
    """Return what compression does to the importance of heads: one row per policy, measure and level.

    Parameters
    ----------
    records : sequence of S dict
        Of the compressed prompts; the first policy is the full cache.
    draws, seed : int
    """
    drawn = with_point(len(records), draws, seed)
    found: list[Changed] = []
    before: dict[tuple[str, str], Float] = {}
    for index, first in enumerate(records[0]["policies"]):
        facts = [record["policies"][index] for record in records]
        retention = float(np.mean([fact["retention"] for fact in facts]))
        message = next((fact["message"] for fact in facts if fact["message"]), None)
        if message:
            found.append(Changed(first["policy"], "-", "-", retention, message, {}))
            continue
        figures = {name: float(np.mean([fact["refined"][name] for fact in facts])) for name in ("nll", "margin", "accuracy")}
        levels = collect([[{**record, **fact} for record, fact in zip(records, facts, strict=True)]])
        for name, level in levels.items():
            for measure, values in level.values.items():
                after = averages(values, drawn)
                start = before.setdefault((measure, name), after)
                found.append(_changed((first["policy"], measure, name, retention, None, figures), start, after, level.n_top))
    return found


def _changed(facts: tuple[Any, ...], before: Float, after: Float, k: int) -> Changed:
    variance, mean, was = after.var(1), after.mean(1), before.var(1)
    ratio = np.divide(variance, was, out=np.full(len(was), np.nan), where=was > 0)
    spread = np.divide(np.sqrt(variance), mean, out=np.full(len(mean), np.nan), where=mean > 0)
    figures = [percentile_interval(float(column[0]), column[1:]) for column in (variance, ratio, spread)]
    return Changed(*facts, *figures, *agreement(before, after, k))


def why_missing(records: Sequence[dict[str, Any]]) -> list[str]:
    """Return one sentence per measure that some prompts lack."""
    counts = Counter((name, why) for record in records for name, why in record.get("missing", {}).items())
    return [f"{name}: {n} of {len(records)} prompts do not count: {why}" for (name, why), n in sorted(counts.items())]


def read_measures(path: Path) -> list[dict[str, Any]]:
    """Read records that a stage wrote.

    Raises
    ------
    DataError
        There are none.
    """
    records = read_records(path)
    if not records:
        raise DataError(f"{path} holds no records; run kvtool analyze importance")
    return records
