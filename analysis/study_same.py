"""Entries of a study that are one policy under several names here: they kept as much in every head and gave the same on every prompt."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from kvtool.analysis.points import Place, Point
from kvtool.analysis.study import StudyData

Row = Mapping[str, Any]
#: Figures of a text that was read; equal in all of them to the last digit is the same policy.
_READ = ("perplexity", "perplexity_low", "perplexity_high", "next_token_accuracy", "effective_context")
#: Groups and places that a warning names.
MOST_GROUPS, MOST_PLACES = 5, 2


def same_words(data: StudyData) -> list[str]:
    """Return the warning that names such entries, or nothing."""
    groups = same_entries(data)
    if not groups:
        return []
    said = []
    for names, places in list(groups.items())[:MOST_GROUPS]:
        more = f" and {len(places) - MOST_PLACES} more" if len(places) > MOST_PLACES else ""
        said.append(f"{' = '.join(names)} ({'; '.join(places[:MOST_PLACES])}{more})")
    left = (
        f"; and {len(groups) - MOST_GROUPS} more group{'s' * (len(groups) > MOST_GROUPS + 1)}"
        if len(groups) > MOST_GROUPS
        else ""
    )
    return [f"the same here at every size, so that nothing tells them apart: {'; '.join(said)}{left}"]


def same_entries(data: StudyData) -> dict[tuple[str, ...], list[str]]:
    """Return groups of names -> the workloads in which they are the same, the largest groups first."""
    found: dict[tuple[str, ...], list[str]] = {}
    kept: dict[frozenset[str], tuple[str, ...]] = {}  # whatever the order that a stage lists them in
    for place in data.places:
        for names in _of_place(place):
            found.setdefault(kept.setdefault(frozenset(names), names), []).append(
                f"{place.model}, {place.task}, {place.length} tokens"
            )
    read = [row for row in data.rows if row.get("perplexity") is not None and not row.get("series") and row["policy"] != "full"]
    for where in dict.fromkeys((row["model"], row["task"], row["length"]) for row in read):
        rows = [row for row in read if (row["model"], row["task"], row["length"]) == where]
        for names in same_read(rows):
            found.setdefault(kept.setdefault(frozenset(names), names), []).append(f"{where[0]}, {where[1]}, {where[2]} tokens")
    return dict(sorted(found.items(), key=lambda item: (-len(item[0]), -len(item[1]))))


def same_read(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Return the groups of rows of one text whose figures are the same, by label, without those that never evict."""
    able = [row for row in rows if "never evicts" not in str(row.get("note") or "")]
    return _grouped((row["label"], tuple(row.get(key) for key in _READ)) for row in able)


def _of_place(place: Place) -> list[tuple[str, ...]]:
    """Methods that are the same at every budget that any of them was run at; those with their own number of entries one by one."""
    able = [point for point in place.points if point.policy != "full" and point.status == "ok" and not point.degenerate]
    curves: dict[str, list[Point]] = {}
    for point in able:
        curves.setdefault(point.label, []).append(point)
    prints: list[tuple[str, Hashable]] = []
    for label, points in curves.items():
        made = {point.budget if point.share else "": fingerprint(point) for point in points}
        if all(value is not None for value in made.values()):
            prints.append((label, tuple(sorted(made.items(), key=str))))
    return _grouped(prints)


def fingerprint(point: Point) -> Hashable:
    """Return what two points have alike only if they are the same policy here; None where that cannot be said.

    Entries of every head and the figures of every prompt. Where all prompts are all right or all wrong, that says nothing.
    """
    values = np.concatenate([np.nan_to_num(point.values[key], nan=-1.0) for key in sorted(point.values)] or [np.zeros(0)])
    if point.heads is None or not values.size or set(np.unique(values)) <= {0.0, 1.0, -1.0}:
        return None
    return (point.heads.tobytes(), values.tobytes())


def _grouped(prints: Iterable[tuple[str, Hashable]]) -> list[tuple[str, ...]]:
    groups: dict[Hashable, list[str]] = {}
    for name, made in prints:
        groups.setdefault(made, []).append(name)
    return [names for group in groups.values() if len(names := tuple(dict.fromkeys(group))) > 1]
