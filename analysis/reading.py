"""Texts that were read: a place of their own, whose losses are rises of the perplexity, and the answer by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvtool.analysis.answer import TOLERANCE
from kvtool.analysis.points import FIGURES, NLL, Place, Point, most_entries, nothing_chosen
from kvtool.analysis.resampling import Documents
from kvtool.analysis.study import StudyData


def text_place(
    records: Sequence[Mapping[str, Any]], model: str, named: Mapping[str, tuple[str, str]], task: str, length: int
) -> Place | None:
    """Digest the records of one run of `kvtool perplexity`; only segments with a record for every policy count. None without any.

    Parameters
    ----------
    records : sequence of dict
    model : str
    named : dict of str to (str, str)
        Policy text -> label and group.
    task : str
        The text.
    length : int
        Tokens of a segment.
    """
    by_policy: dict[str, dict[str, Mapping[str, Any]]] = {}
    for record in records:
        by_policy.setdefault(record["policy"], {})[record["sample"]] = record
    first = next(iter(by_policy.values()), {})
    samples = tuple(sample for sample in first if all(sample in own for own in by_policy.values()))
    if not samples:
        return None
    points = tuple(_point(policy, [own[s] for s in samples], named, length) for policy, own in by_policy.items())
    documents = Documents.grouped([str(first[s]["document"]) for s in samples])
    return Place(model, task, length, "text", "perplexity", "perplexity", samples, points, documents=documents)


def _point(policy: str, records: Sequence[Mapping[str, Any]], named: Mapping[str, tuple[str, str]], length: int) -> Point:
    first, bad = records[0], [r for r in records if r["status"] != "ok" or not r.get("n")]
    label, group = named.get(policy, (policy, ""))
    start = (label, group, policy, first["method"], first["budget"])
    degenerate = any(r["degenerate"] for r in records)
    if bad:
        return Point(*start, str(bad[0]["status"]), degenerate)
    entries = float(np.mean([most_entries(r) for r in records]))
    values = {NLL: np.asarray([r["nll"] / r["n"] for r in records], dtype=np.float64)}
    return Point(*start, "ok", degenerate, retention=entries / length, entries=entries, values=values)


def reading_answer(data: StudyData) -> tuple[str, list[str]] | None:
    """Return the answer by texts, and its rule: the smallest context whose perplexity is within 5 % of the full cache's."""
    rows = [
        r for r in data.rows if r.get("perplexity_ratio") is not None and r.get("effective_context") and r["policy"] != "full"
    ]
    bare = {point.label for place in data.texts for point in place.points if nothing_chosen(point.policy, place.length)}
    rows = [r for r in rows if "never evicts" not in str(r["note"] or "") and r["label"] not in bare]
    if not rows:
        return None
    rule = (
        "the choice: fewest entries per head, sinks included, whose perplexity is by its 95 % interval not more than 5 % above the "
        "full cache's (of lazy eviction its capacity, which it fills between cuts)"
    )
    places = list(dict.fromkeys((r["model"], r["task"], r["length"]) for r in rows))
    said = []
    for place in places:
        mine = [r for r in rows if (r["model"], r["task"], r["length"]) == place]
        bound = [
            (r, r["perplexity_ratio_high"] if r["perplexity_ratio_high"] is not None else r["perplexity_ratio"]) for r in mine
        ]
        good = [r for r, high in bound if high <= 1.05]
        if good:
            best = min(good, key=lambda r: (r["effective_context"], r["perplexity"]))
            high = best["perplexity_ratio_high"] or best["perplexity_ratio"]
            change, half = 100 * (best["perplexity_ratio"] - 1), 100 * abs(high - best["perplexity_ratio"])
            saved = 100 * (1 - best["effective_context"] / place[2])
            said.append(
                f"on {place[1]} run {best['label']}: {best['effective_context']:.0f} of {place[2]} entries, {saved:.0f} % "
                f"fewer; perplexity {change:+.1f} ± {half:.1f} %{_fails(data, best)}"
            )
        else:
            said.append(f"on {place[1]} nothing within 5 % of the full cache's perplexity: keep it")
    return f"For {', '.join(dict.fromkeys(str(p[0]) for p in places))}: {'; '.join(said)}.", [rule]


def _fails(data: StudyData, row: Mapping[str, Any]) -> str:
    """Say on which tasks of the same study, with the same model, a row's policy clearly loses score: few tokens of a text need recall."""
    found = []
    for place in data.places:
        figure = place.figure()
        point = next((p for p in place.points if (p.label, p.budget) == (row["label"], row["budget"])), None)
        point = point or next((p for p in place.points if p.label == row["label"] and not p.share), None)
        if figure is None or point is None or place.model != row["model"]:
            continue
        change = place.change(point, figure)
        if change is not None and change.high < -TOLERANCE:
            found.append(
                f"{change.mean:+.2f} ({change.low:+.2f} to {change.high:+.2f}) {FIGURES[figure][1]} on {place.task} at {place.length}"
            )
    return f" - but it fails on this study's tasks: {', '.join(found)}" if found else ""
