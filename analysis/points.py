"""What a run measured at each point: a method at a retention, in one cell (model, task, length, mode), prompt by prompt.

Shapes: S prompts (of texts: segments), L layers, H KV heads.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtool.analysis.consistency import document
from kvtool.analysis.plain import short_names
from kvtool.analysis.resampling import Documents, change_interval, mean_interval
from kvtool.analysis.statistics import Interval

Float = NDArray[np.float64]
FULL, CONTROL = "full", "random"
#: What losses are counted in: the record's key, its name in words.
FIGURES = {
    "score": ("score", "task score"),
    "accuracy": ("answer_accuracy", "answer accuracy"),
    "nll": ("text_nll", "perplexity"),
}
#: The figure of texts: nats per token of each segment. Losses are rises of the perplexity.
NLL = "nll"


@dataclass(frozen=True, slots=True)
class Point:
    """One method at one retention.

    Attributes
    ----------
    label, group : str
        Name of the method in a study, else its text form without paths; heading that it stands under, or ``""``.
    policy, method : str
        Text forms, with and without budget.
    budget : str or None
        As asked for.
    status : str
        ``"ok"``, or the first of its samples' states that is not.
    degenerate : bool
        Nothing was left to choose.
    retention, entries, saved : float or None
        Kept share of the prompt; entries per head; share of the full cache's bytes that is saved (room to grow not counted).
    kv_bytes, tpot_s : float or None
        Bytes that hold entries after the prompt; median time per token.
    values : dict of str to ndarray of shape (S,)
        By key of `FIGURES`; NaN where a prompt has no such figure. Empty unless every sample is ok.
    heads : ndarray of shape (L, H) or None
        Mean entries kept.
    """

    label: str
    group: str
    policy: str
    method: str
    budget: str | None
    status: str
    degenerate: bool
    retention: float | None = None
    entries: float | None = None
    saved: float | None = None
    kv_bytes: float | None = None
    tpot_s: float | None = None
    values: dict[str, Float] = field(default_factory=dict)
    heads: Float | None = None

    @property
    def share(self) -> bool:
        """Whether the budget is a share of the prompt, so that the method has a curve."""
        return self.budget is not None and self.budget.endswith("%")

    @property
    def control(self) -> bool:
        """Whether this is the random control."""
        return self.method.split(":")[0] == CONTROL


@dataclass(frozen=True, slots=True)
class Place:
    """One cell: all its points were run on the same prompts.

    Attributes
    ----------
    model, task : str
    length : int
        Prompt tokens: as asked for, else the longest.
    compress_at, metric : str
    stage : str
        Name of the stage in a study, else ``""``.
    samples : tuple of str
    points : tuple of Point
        In the order of the run; the full cache is one of them.
    facts : dict of str to int
        What a reader must know: prompts whose answers were cut, of one token, and so on.
    documents : Documents or None
        Of the samples; None: each is of its own.
    finer : tuple of Point
        Budgets that were added to families (policies that differ in their own number of entries only); cliffs look at them, nothing else.
    """

    model: str
    task: str
    length: int
    compress_at: str
    metric: str
    stage: str
    samples: tuple[str, ...]
    points: tuple[Point, ...]
    facts: dict[str, int] = field(default_factory=dict)
    documents: Documents | None = None
    finer: tuple[Point, ...] = ()

    @property
    def title(self) -> str:
        """As tables name it."""
        return f"{self.model}, {self.task}, {self.length} tokens, compressed at the {self.compress_at}"

    @property
    def full(self) -> Point | None:
        """The full cache, if it was run."""
        return next((p for p in self.points if p.policy == FULL and p.status == "ok"), None)

    def figure(self) -> str | None:
        """Return what losses are counted in: the score, or answer accuracy where nothing was generated; None without the full cache."""
        full = self.full
        return None if full is None else next((key for key in FIGURES if key in full.values), None)

    def mean(self, point: Point, key: str) -> Interval | None:
        """Return the mean of a figure, over the prompts that have it."""
        values = point.values.get(key)
        if values is None:
            return None
        known = ~np.isnan(values)
        return mean_interval(values[known], self._documents(known))

    def change(self, point: Point, key: str) -> Interval | None:
        """Return a figure minus the full cache's on the same prompts."""
        return self.versus(point, self.full, key)

    def versus(self, first: Point | None, second: Point | None, key: str) -> Interval | None:
        """Return the difference of two points in a figure, on the prompts that both have; of a point from itself 0, for sure."""
        if first is not None and first is second and key in first.values:
            return Interval(0.0, 0.0, 0.0)
        pair, known = self.pair(first, second, key), self._known(first, second, key)
        return None if pair is None or known is None else change_interval(*pair, self._documents(known), share=key != NLL)

    def loss(self, point: Point, key: str) -> Interval | None:
        """Return the relative loss against the full cache; None where that has nothing to lose.

        Of scores (full - point) / full, of texts perplexity / full cache's - 1.
        """
        return self.fall(self.full, point, key)

    def fall(self, above: Point | None, below: Point | None, key: str) -> Interval | None:
        """Return what is lost from one point to another, in units of the full cache's mean; of texts the rise of perplexity.

        The interval is that of the paired difference: whether something is lost is one question, whatever the unit.
        """
        change = self.versus(below, above, key)
        if change is None:
            return None
        if key == NLL:
            return Interval(*(math.expm1(v) for v in (change.mean, change.low, change.high)))
        whole = self.mean(self.full, key) if self.full is not None else None
        if whole is None or not whole.mean > 0:
            return None
        mean, low, high = (-v / whole.mean + 0.0 for v in (change.mean, change.high, change.low))
        return Interval(mean, low, high if math.isnan(high) else min(high, max(1.0, mean)))

    def pair(self, first: Point | None, second: Point | None, key: str) -> tuple[Float, Float] | None:
        """Return a figure of two points on the prompts that both have."""
        known = self._known(first, second, key)
        if first is None or second is None or known is None:
            return None
        return first.values[key][known], second.values[key][known]

    def _known(self, first: Point | None, second: Point | None, key: str) -> NDArray[np.bool_] | None:
        a, b = (None if point is None else point.values.get(key) for point in (first, second))
        if a is None or b is None:
            return None
        known = ~(np.isnan(a) | np.isnan(b))
        return known if known.any() else None

    def _documents(self, known: NDArray[np.bool_]) -> Documents:
        return Documents.apart(int(known.sum())) if self.documents is None else self.documents.at(known)


def common_budgets(points: Iterable[Point]) -> frozenset[str]:
    """Return the shares that most methods were run at, the control not counted.

    What was added where one method's curve falls is not among them: others may hold there, too, and were not asked.
    """
    tried = {(p.label, p.budget) for p in points if p.share and p.budget and not p.control}
    counts = Counter(budget for _, budget in tried)
    return frozenset(budget for budget, n in counts.items() if n == max(counts.values()))


@lru_cache(maxsize=4096)
def nothing_chosen(policy: str, length: int) -> bool:
    """Return whether a lazy eviction drops so many entries at once that a cut leaves sink and window only: no heavy hitter.

    Parameters
    ----------
    policy : str
        Text form.
    length : int
        Tokens of the prompt or segment.
    """
    if "interval=" not in policy:
        return False
    from kvtool.policies import parse_policy

    parsed = parse_policy(policy)
    # A cut leaves capacity - (interval - 1) entries, and never less than the protected ones.
    return parsed.asked(length) - (parsed.when.interval - 1) <= parsed.method.parts().selector.protected


def most_entries(record: Mapping[str, Any]) -> float:
    """Return the entries per head that a text's cache must have room for.

    With lazy eviction that is its capacity, which fills up before each cut: what is left at the end depends on where the text ends.
    """
    held = float(record["entries"])
    if int(record.get("interval") or 1) > 1 and record.get("evicted"):
        return max(held, float(record["planned_entries"]))
    return held


def make_place(
    records: Sequence[Mapping[str, Any]], model: str, named: Mapping[str, tuple[str, str]] | None = None, **facts: Any
) -> Place | None:
    """Digest the records of one run; only prompts with a record for every policy count. None without any.

    Parameters
    ----------
    records : sequence of dict
        As ``kvtool infer`` writes them.
    model : str
    named : dict of str to (str, str), optional
        Policy text -> label and group.
    **facts
        ``task``, ``length``, ``stage``: over those of the records.
    """
    by_policy: dict[str, dict[str, Mapping[str, Any]]] = {}
    for record in records:
        by_policy.setdefault(record["policy"], {})[record["sample"]] = record
    if not by_policy:
        return None
    first = next(iter(by_policy.values()))
    samples = tuple(sample for sample in first if all(sample in own for own in by_policy.values()))
    if not samples:
        return None
    methods = short_names([own[samples[0]]["method"] for own in by_policy.values()])
    points = tuple(
        _point(policy, [own[s] for s in samples], {policy: (methods[own[samples[0]]["method"]], ""), **(named or {})})
        for policy, own in by_policy.items()
    )
    record = first[samples[0]]
    length = facts.get("length") or max(r["seq_len"] for r in first.values())
    return Place(
        model=model,
        task=str(facts.get("task") or record.get("meta", {}).get("task", "")),
        length=int(length),
        compress_at=record["compress_at"],
        metric=str(record.get("metric", "")),
        stage=str(facts.get("stage", "")),
        samples=samples,
        points=points,
        facts=_facts([first[s] for s in samples]),
        documents=Documents.grouped([document(dict(first[s])) for s in samples]),
    )


def _point(policy: str, records: Sequence[Mapping[str, Any]], named: Mapping[str, tuple[str, str]]) -> Point:
    first, bad = records[0], [r for r in records if r["status"] != "ok"]
    label, group = named[policy]
    degenerate = any(r["degenerate"] for r in records)
    start = (label, group, policy, first["method"], first["budget"])
    if bad:
        return Point(*start, str(bad[0]["status"]), degenerate)
    held = sum(r["kv_bytes_prompt_end"] - r["slack_bytes"] for r in records)
    return Point(
        *start,
        "ok",
        degenerate,
        retention=_mean(r["retention"] for r in records),
        entries=_mean(r["entries"] for r in records),
        saved=1 - held / sum(r["kv_bytes_full"] for r in records),
        kv_bytes=held / len(records),
        tpot_s=_median(r.get("tpot_s") for r in records),
        values={
            key: np.asarray([np.nan if r.get(name) is None else r[name] for r in records], dtype=np.float64)
            for key, (name, _) in FIGURES.items()
            if any(r.get(name) is not None for r in records)
        },
        heads=_mean_heads([r.get("head_entries") for r in records]),
    )


def _mean_heads(tables: Sequence[Any]) -> Float | None:
    """Mean over prompts; None where some prompt has no such table."""
    if any(table is None for table in tables):
        return None
    total = np.zeros(np.shape(tables[0]))
    for table in tables:
        total += np.asarray(table, dtype=np.float64)
    mean: Float = total / len(tables)
    return mean


def _facts(records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    meta = [r.get("meta") or {} for r in records]
    counts = {
        "answer_cut": sum(bool(m.get("answer_truncated")) for m in meta),
        "prompt_cut": sum(bool(m.get("truncated") or m.get("cut")) for m in meta),
        "own_answer": sum(m.get("answer_source") == "full-cache" for m in meta),
    }
    return {name: count for name, count in counts.items() if count}


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _median(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.median(known)) if known else None
