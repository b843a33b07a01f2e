"""Methods against a baseline and against each other, on the same samples: intervals, paired tests, corrected for their number.

Shapes: S samples, C documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtool.analysis.consistency import document
from kvtool.analysis.load import Reality
from kvtool.analysis.resampling import DRAWS, METHODS, Documents, change_interval, holm, mean_interval, median_ratio, paired_p
from kvtool.analysis.specialization import UNKNOWN, Specialization, mean_specialization
from kvtool.analysis.statistics import Interval
from kvtool.errors import ConfigError, DataError, near_matches

Float = NDArray[np.float64]

#: figure -> whether it lies between 0 and 1; metrics that are named in full are figures, too, and do
FIGURES: dict[str, bool] = {
    "score": True,
    "answer_accuracy": True,
    "answer_exact": True,
    "answer_nll": False,
    "answer_margin": False,
}
TIMES = ("tpot_s", "ttft_s")
LEVEL = 0.05


@dataclass(frozen=True, slots=True)
class Draws:
    """How intervals and tests are drawn.

    Attributes
    ----------
    n, seed : int
    method : str
        Of the bootstrap intervals: of `kvtool.analysis.resampling.METHODS`.
    """

    n: int = DRAWS
    seed: int = 0
    method: str = METHODS[0]


@dataclass(frozen=True, slots=True)
class Joined:
    """Several comparable runs as one.

    Attributes
    ----------
    records : dict of str to list of dict
        Policy -> its records in the order of `samples`, from the first run that has it.
    repeats : list of (str, list of dict, list of dict)
        Policy, and its records of two runs.
    samples : tuple of str
    documents : Documents
    """

    records: dict[str, list[dict[str, Any]]]
    repeats: list[tuple[str, list[dict[str, Any]], list[dict[str, Any]]]]
    samples: tuple[str, ...]
    documents: Documents

    @classmethod
    def of(cls, realities: Sequence[Reality]) -> Joined:
        """Join runs that `kvtool.analysis.controls.check_comparable` let through."""
        samples = tuple(sorted(realities[0].samples))
        records: dict[str, list[dict[str, Any]]] = {}
        repeats = []
        for reality in realities:
            for policy in reality.policies:
                mine = sorted(reality.of(policy), key=lambda record: record["sample"])
                if policy in records:
                    repeats.append((policy, records[policy], mine))
                else:
                    records[policy] = mine
        names = [document(record) for record in next(iter(records.values()))]
        return cls(records, repeats, samples, Documents.grouped(names))

    def measured(self, figure: str) -> NDArray[np.int64]:
        """Return the samples that have a figure under every policy that ran: every mean is over the same ones."""
        able = [rows for rows in self.records.values() if all(r["status"] == "ok" for r in rows)]
        having = [i for i in range(len(self.samples)) if all(figure_of(rows[i], figure) is not None for rows in able)]
        return np.asarray(having, dtype=np.int64)

    def values(self, policy: str, figure: str, at: NDArray[np.int64]) -> Float | None:
        """Return a figure of the samples `at`; None for a policy that did not finish on every sample."""
        return values_of(self.records[policy], figure, at)


def values_of(records: Sequence[dict[str, Any]], figure: str, at: NDArray[np.int64]) -> Float | None:
    """Return a figure of the records `at`; None if any record has no result."""
    found = [figure_of(records[i], figure) for i in at]
    if not found or None in found or any(r["status"] != "ok" for r in records):
        return None
    return np.asarray(found, dtype=np.float64)


def figure_of(record: dict[str, Any], figure: str) -> float | None:
    """Return a figure of a record, or its score under a metric that is named in full."""
    found = record[figure] if figure in record else (record.get("scores") or {}).get(figure)
    return None if found is None else float(found)


@dataclass(frozen=True, slots=True)
class Versus:
    """A mean, and the difference from the baseline on the same samples.

    Attributes
    ----------
    mean : Interval
    change : Interval or None
        Minus the baseline; None for the baseline itself.
    p, p_holm : float or None
        Paired test of no difference; adjusted (Holm) for all policies that are compared with the baseline in this figure.
    """

    mean: Interval
    change: Interval | None = None
    p: float | None = None
    p_holm: float | None = None


@dataclass(frozen=True, slots=True)
class CompareRow:
    """One policy.

    Attributes
    ----------
    policy, method : str
    budget : str or None
    status : str
    message : str or None
    degenerate : bool
    retention : float or None
        Mean over samples of what is really kept.
    figures : dict of str to Versus
    efficiency : Interval or None
        Cache Efficiency Ratio: 100 x score / retention in percent.
    heads : Specialization
        Of the entries kept per KV head, over all layers; mean over samples.
    speed : dict of str to Interval
        ``tpot_s`` and ``ttft_s`` over the baseline's on the same sample, medians.
    """

    policy: str
    method: str
    budget: str | None
    status: str
    message: str | None
    degenerate: bool
    retention: float | None
    figures: dict[str, Versus]
    efficiency: Interval | None
    heads: Specialization
    speed: dict[str, Interval]


@dataclass(frozen=True, slots=True)
class PairRow:
    """Two policies of one budget in one figure: ``a - b`` on the same samples, adjusted for all pairs of that figure."""

    figure: str
    budget: str
    a: str
    b: str
    change: Interval
    p: float
    p_holm: float


@dataclass(frozen=True, slots=True)
class NoiseRow:
    """The same policy run twice (A/A): what differs is noise.

    Attributes
    ----------
    policy : str
    n : int
        Samples with a result in both runs.
    identical : float
        Share of them whose records agree in every field but times and peak memory.
    changes : dict of str to Interval
        Second minus first run, per figure.
    speed : dict of str to Interval
        Second over first run, medians.
    """

    policy: str
    n: int
    identical: float
    changes: dict[str, Interval]
    speed: dict[str, Interval]


def choose_figures(joined: Joined, asked: Sequence[str]) -> list[str]:
    """Return the figures to compare; without a request the task score and the answer accuracy, as far as there are any.

    Raises
    ------
    ConfigError
        Unknown figure.
    DataError
        Nothing was measured.
    """
    for name in asked:
        if name not in (known := known_figures(joined)):
            raise ConfigError(f"no figure {name!r}.{near_matches(name, known)} Known: {', '.join(known)}")
    found = [name for name in asked or ("score", "answer_accuracy") if len(joined.measured(name))]
    if missing := [name for name in asked if name not in found]:
        raise DataError(f"no sample has the figure {missing[0]!r} under every policy that ran on all of them")
    if not found:
        raise DataError("these runs hold neither scores nor answer accuracies; nothing can be compared")
    return found


def known_figures(joined: Joined) -> list[str]:
    """Return the figures that can be asked for: the usual ones, and the metrics that texts were scored by."""
    metrics = (name for records in joined.records.values() for r in records for name in r.get("scores") or ())
    return list(dict.fromkeys([*FIGURES, *metrics]))


def compare_rows(joined: Joined, baseline: str, figures: Sequence[str], how: Draws) -> list[CompareRow]:
    """Return one row per policy, the baseline first."""
    against = {name: _against(joined, baseline, name, how) for name in figures}
    order = [baseline, *(policy for policy in joined.records if policy != baseline)]
    return [
        _row(joined, baseline, policy, {name: found.get(policy) for name, found in against.items()}, how) for policy in order
    ]


def _against(joined: Joined, baseline: str, figure: str, how: Draws) -> dict[str, Versus]:
    """Compare all policies with the baseline in one figure; they are one family of tests."""
    at = joined.measured(figure)
    start = joined.values(baseline, figure, at)
    documents = Documents(_renumbered(joined.documents.of[at]))
    share = FIGURES.get(figure, True)
    found: dict[str, Versus] = {}
    for policy in joined.records:
        values = joined.values(policy, figure, at)
        if values is None:
            continue
        binary = None if share else False
        mean = mean_interval(values, documents, binary=binary, method=how.method, draws=how.n, seed=how.seed)
        if start is None or policy == baseline:
            found[policy] = Versus(mean)
            continue
        change = change_interval(values, start, documents, share=share, method=how.method, draws=how.n, seed=how.seed)
        found[policy] = Versus(mean, change, paired_p(values - start, documents, how.n, how.seed))
    tested = [policy for policy, versus in found.items() if versus.p is not None]
    adjusted = holm([p for policy in tested if (p := found[policy].p) is not None])
    for policy, p in zip(tested, adjusted, strict=True):
        old = found[policy]
        found[policy] = Versus(old.mean, old.change, old.p, p)
    return found


def _renumbered(of: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.unique(of, return_inverse=True)[1].astype(np.int64)


def _row(joined: Joined, baseline: str, policy: str, found: dict[str, Versus | None], how: Draws) -> CompareRow:
    records = joined.records[policy]
    bad = next((r for r in records if r["status"] != "ok"), None)
    first = bad or records[0]
    figures = {name: versus for name, versus in found.items() if versus is not None}
    retention = None if bad else float(np.mean([r["retention"] for r in records]))
    score = figures.get("score")
    return CompareRow(
        policy=policy,
        method=first["method"],
        budget=first["budget"],
        status=first["status"],
        message=first["message"],
        degenerate=any(r["degenerate"] for r in records),
        retention=retention,
        figures=figures,
        efficiency=None if score is None or not retention else efficiency(score.mean, retention),
        heads=UNKNOWN if bad else _kept_by_heads(records),
        speed={} if bad or policy == baseline else _speed(joined, records, joined.records[baseline], how),
    )


def efficiency(score: Interval, retention: float) -> Interval:
    """Return the Cache Efficiency Ratio, score (0 ... 100) over retention (percent): 90 at 2 % gives 45.

    Score and retention are both stored as fractions, so the hundreds cancel.
    """
    return Interval(score.mean / retention, score.low / retention, score.high / retention)


def _kept_by_heads(records: Sequence[dict[str, Any]]) -> Specialization:
    tables = [r["head_entries"] for r in records if r.get("head_entries")]
    return mean_specialization(tables) if tables else UNKNOWN


def _speed(
    joined: Joined, records: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], how: Draws
) -> dict[str, Interval]:
    """Return times over those of other records of the same samples."""
    found = {}
    for name in TIMES:
        at = [i for i, (a, b) in enumerate(zip(records, others, strict=True)) if a.get(name) and b.get(name)]
        if at:
            mine, theirs = (np.asarray([rows[i][name] for i in at], dtype=np.float64) for rows in (records, others))
            documents = Documents(_renumbered(joined.documents.of[at]))
            found[name] = median_ratio(mine, theirs, documents, min(how.n, 2000), how.seed)
    return found


def pair_rows(joined: Joined, baseline: str, figures: Sequence[str], how: Draws) -> list[PairRow]:
    """Compare policies of the same budget with each other; all pairs of one figure are one family of tests."""
    rows: list[PairRow] = []
    for figure in figures:
        at = joined.measured(figure)
        documents = Documents(_renumbered(joined.documents.of[at]))
        tested = []
        for budget, members in _by_budget(joined, baseline).items():
            known = {policy: v for policy in members if (v := joined.values(policy, figure, at)) is not None}
            for a, b in combinations(known, 2):
                change = change_interval(
                    known[a],
                    known[b],
                    documents,
                    share=FIGURES.get(figure, True),
                    method=how.method,
                    draws=how.n,
                    seed=how.seed,
                )
                tested.append((budget, a, b, change, paired_p(known[a] - known[b], documents, how.n, how.seed)))
        adjusted = holm([p for *_, p in tested])
        rows += [PairRow(figure, *facts, p_holm) for facts, p_holm in zip(tested, adjusted, strict=True)]
    return rows


def _by_budget(joined: Joined, baseline: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for policy, records in joined.records.items():
        if policy != baseline and records[0]["budget"] is not None:
            found.setdefault(records[0]["budget"], []).append(policy)
    return found


#: ends of the names of fields that the machine decides: times, and peaks of the process's memory
MACHINE = ("_s", "_ms", "_peak_bytes")


def noise_rows(joined: Joined, figures: Sequence[str], how: Draws) -> list[NoiseRow]:
    """Return one row per policy and repeat."""
    rows = []
    for policy, first, second in joined.repeats:
        both = [i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a["status"] == b["status"] == "ok"]
        if not both:
            continue
        same = [_untimed(first[i]) == _untimed(second[i]) for i in both]
        changes = {}
        for figure in figures:
            known = [(i, figure_of(second[i], figure), figure_of(first[i], figure)) for i in both]
            found = [(i, b - a) for i, b, a in known if a is not None and b is not None]
            if found:
                difference = np.asarray([d for _, d in found], dtype=np.float64)
                documents = Documents(_renumbered(joined.documents.of[[i for i, _ in found]]))
                changes[figure] = mean_interval(
                    difference, documents, binary=False, method=how.method, draws=how.n, seed=how.seed
                )
        rows.append(NoiseRow(policy, len(both), float(np.mean(same)), changes, _speed(joined, second, first, how)))
    return rows


def _untimed(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if not key.endswith(MACHINE)}
