"""The answer first: which configuration to run, what it saves and costs, and what cannot be told from this run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvtool.analysis.load import Reality
from kvtool.analysis.resampling import change_interval
from kvtool.analysis.statistics import TIE, Interval
from kvtool.analysis.tables import CONTROL, TableRow

#: a configuration costs too much if its score may be this much below the full cache's (lower end of the interval)
TOLERANCE = 0.05
#: with fewer prompts no recommendation is called sure
MIN_PROMPTS = 16


def holding(changes: Sequence[Interval]) -> list[int]:
    """Return which differences from the full cache are none that counts, by number.

    Those whose interval ends above -`TOLERANCE`. Few prompts cannot show that of anything: where none does, those that lost nothing
    on the prompts there are, which `cost` says.
    """
    sure = [i for i, change in enumerate(changes) if change.low >= -TOLERANCE]
    return sure or [i for i, change in enumerate(changes) if change.mean >= -TIE]


def cost(change: Interval, n: int, verbs: tuple[str, str] = ("costs", "gains")) -> str:
    """Return what a choice costs on n prompts, in words."""
    if abs(change.mean) <= TIE:
        unseen = "they are too few to say what could go unseen"
        if not math.isnan(change.low):
            unseen = f"a true loss of up to {-change.low:.2f} could go unseen"
        return f"{verbs[0]} nothing on {counted(n, 'prompt')} ({unseen})"
    half = max(change.high - change.mean, change.mean - change.low)
    return f"{verbs[0] if change.mean <= 0 else verbs[1]} {abs(change.mean):.2f} ± {half:.2f}"


def counted(n: int, noun: str) -> str:
    """Return e.g. ``1 workload`` or ``3 workloads``."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


@dataclass(frozen=True, slots=True)
class Answer:
    """The recommendation.

    Attributes
    ----------
    headline : str
        One sentence.
    details : tuple of str
        What it rests on, and which configurations are as good.
    policy : str or None
        None if nothing qualifies.
    """

    headline: str
    details: tuple[str, ...]
    policy: str | None

    def text(self) -> str:
        """Return the answer as plain text."""
        return "\n".join([self.headline, *(f"  {line}" for line in self.details)])


def make_answer(rows: Sequence[TableRow], reality: Reality) -> Answer:
    """Choose the smallest cache that holds the score of the full cache, see `holding`.

    Parameters
    ----------
    rows : sequence of TableRow
    reality : Reality
        For paired comparisons on the same prompts.
    """
    n = len(reality.samples)
    able = [
        r for r in rows if r.status == "ok" and r.budget and r.change and r.score and not r.degenerate and not _is_control(r)
    ]
    if not able and not reality.config.get("generate", True):
        return Answer("Nothing was generated (--no-generate): there are no task scores to recommend by.", (), None)
    if not able:
        return Answer("No compressed configuration was run for real: there is nothing to recommend.", (), None)
    good = [able[i] for i in holding([r.change for r in able if r.change])]
    if not good:
        best = max(able, key=lambda r: (r.score.mean if r.score else 0.0, -(r.kv_bytes or 0.0)))
        loss = best.change.text(sign=True) if best.change else "-"
        headline = (
            f"No configuration kept the score within {TOLERANCE:g} of the full cache; keep the full cache for this workload."
        )
        return Answer(headline, (f"the closest is {best.label or best.policy}: score change {loss} on {n} prompts",), None)
    smallest = min(r.kv_bytes or 0.0 for r in good)
    peers = [r for r in good if (r.kv_bytes or 0.0) <= smallest * 1.01]
    best = max(peers, key=lambda r: (r.accuracy.mean if r.accuracy else 0.0, r.policy))
    return Answer(_headline(best, n), tuple(_details(best, able, reality, n)), best.policy)


def _is_control(row: TableRow) -> bool:
    return row.method.split(":")[0] == CONTROL


def _headline(row: TableRow, n: int) -> str:
    assert row.change is not None
    assert row.saved is not None
    assert row.retention is not None
    return (
        f"For this model and workload run {row.name or row.method} at {100 * row.retention:.1f} % of the entries: it saves "
        f"{100 * row.saved:.1f} % of the KV cache and {cost(row.change, n)} (score)."
    )


def _details(best: TableRow, able: Sequence[TableRow], reality: Reality, n: int) -> list[str]:
    lines = [
        f"smallest cache whose score, by its 95 % interval, is not more than {TOLERANCE:g} below the full cache ({counted(n, 'prompt')})"
    ]
    if best.change is not None and best.change.low < -TOLERANCE:
        lines = [
            f"smallest cache that lost nothing on these prompts: {counted(n, 'prompt')} cannot show that a score is not more than "
            f"{TOLERANCE:g} below the full cache"
        ]
    tied = []
    own = reality.values(best.policy, "answer_accuracy")
    for row in able:
        other = reality.values(row.policy, "answer_accuracy")
        if row is not best and row.budget == best.budget and own is not None and other is not None:
            interval = change_interval(own, other, reality.documents("answer_accuracy"))
            if interval.low <= 0:
                tied.append(row.name or row.method)
    if tied:
        lines.append(f"not told apart from it at this budget: {', '.join(tied)}")
    if best.label and best.label != best.policy:
        lines.append(f"in full: {best.policy}")
    if n < MIN_PROMPTS:
        lines.append(f"only {counted(n, 'prompt')}: take this as a first look; {MIN_PROMPTS} or more make it firmer")
    return lines


def warnings(rows: Sequence[TableRow], reality: Reality) -> list[str]:
    """Return what a reader must know before believing the figures."""
    found = []
    for status, text in (
        ("impossible", "cannot run: the budget is below the protected entries"),
        ("oom", "ran out of memory"),
        ("failed", "were given up: every worker that ran them died"),
    ):
        names = [r.label or r.policy for r in rows if r.status == status]
        if names:
            found.append(f"{len(names)} configurations {text}: {', '.join(names)}")
    degenerate = [r.label or r.policy for r in rows if r.degenerate and r.status == "ok"]
    if degenerate:
        found.append(f"degenerate (budget = sink + window, nothing left to choose): {', '.join(degenerate)}")
    beaten: dict[str | None, list[str]] = {}
    for row in rows:
        if row.beats_control is False:
            beaten.setdefault(row.budget, []).append(row.name or row.method)
    for budget, methods in beaten.items():
        found.append(
            f"at {budget} no clear gain in answer accuracy over random entries with the same kind of protection: {', '.join(methods)}"
        )
    truncated = sorted({r["sample"] for r in reality.records if r.get("meta", {}).get("answer_truncated")})
    if truncated:
        found.append(f"{len(truncated)} prompts have longer answers than were scored: their first tokens only")
    short = len(reality.samples) - len(reality.measured("answer_accuracy"))
    if short:
        found.append(f"{short} prompts have an answer of one token, which compression cannot change: no answer accuracy there")
    own = sorted({r["sample"] for r in reality.records if r.get("meta", {}).get("answer_source") == "full-cache"})
    if own:
        found.append(f"{len(own)} prompts have no gold answer: the full cache's own answer is the reference")
    full = [r["score"] for r in reality.records if r["policy"] == "full" and r["status"] == "ok"]
    if full and sum(full) / len(full) < 0.5:
        found.append(
            f"the full cache itself scores only {sum(full) / len(full):.2f}: losses by compression are hard to see here"
        )
    return found
