"""What a whole study measured, as the report needs it, and its answer: per workload the smallest cache that holds the score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvtool.analysis.answer import MIN_PROMPTS, TOLERANCE, cost, counted, holding
from kvtool.analysis.cliffs import asked
from kvtool.analysis.points import FIGURES, Place, Point, common_budgets, nothing_chosen
from kvtool.analysis.statistics import Interval

Rows = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class StudyData:
    """A study's results.

    Attributes
    ----------
    name, scale, about : str
    places : tuple of Place
        Cells with real runs, the first of repeated ones.
    predicted : tuple of dict
        Per place: policy text -> row of its simulation; empty without one.
    rows : list of dict
        Flat result rows of every stage, as in ``results.csv``.
    nodes : list of dict
        ``title``, ``name``, ``kind``, ``state``, ``note``, ``seconds``.
    tables : list of (str, list, list)
        The study's own numbers and findings: title, header, lines.
    folders : dict of str to list of (str, Path)
        Kind of stage -> title and result folder of its finished nodes.
    provenance : dict
    texts : tuple of Place
        Texts that were read, see `kvtool.analysis.reading`.
    asks : str
        Metric that most of the study's findings are about; empty without findings.
    """

    name: str
    scale: str
    about: str
    places: tuple[Place, ...]
    predicted: tuple[Rows, ...]
    rows: list[dict[str, Any]]
    nodes: list[dict[str, Any]]
    tables: list[tuple[str, list[str], list[list[str]]]] = field(default_factory=list)
    folders: dict[str, list[tuple[str, Path]]] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    texts: tuple[Place, ...] = ()
    asks: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """The answer for one workload.

    Attributes
    ----------
    place : Place
    point : Point or None
        None: nothing held the score.
    figure : str
    change : Interval or None
        Of the chosen one; of the full cache, where that is the answer, from itself.
    tied : tuple of str
        Others at its retention that are not told apart from it.
    why : str
        Why there is no choice, and how close the closest comes.
    """

    place: Place
    point: Point | None
    figure: str
    change: Interval | None
    tied: tuple[str, ...] = ()
    why: str = ""


def choose(place: Place) -> Choice:
    """Choose the smallest cache that holds the score, as a run's report does: see `kvtool.analysis.answer.holding`.

    Among points at shares that all compared methods were run at: else a method would win by a retention that only it was asked for.
    Lazy eviction that leaves nothing chosen is no choice, however well it does on a prompt that its last cut spared.
    """
    figure = place.figure()
    if figure is None:
        return Choice(place, None, "score", None, why="no full cache beside it")
    grid = common_budgets(place.points)
    able = [
        (p, place.change(p, figure))
        for p in place.points
        if p.budget and not p.degenerate and not p.control and (not p.share or p.budget in grid)
        if not nothing_chosen(p.policy, place.length)
    ]
    known = [(p, change) for p, change in able if change is not None]
    good = [known[i] for i in holding([change for _, change in known])]
    if not good:
        best = max(known, key=lambda pair: pair[1].mean, default=None)
        why = "nothing was run"
        if best is not None:
            why = f"closest: {best[0].label} at {100 * (best[0].retention or 0):.3g} %, {FIGURES[figure][1]} {best[1].text(sign=True)}"
        return Choice(place, None, figure, place.versus(place.full, place.full, figure), why=why)
    smallest = min(p.kv_bytes or 0.0 for p, _ in good)
    peers = [(p, c) for p, c in good if (p.kv_bytes or 0.0) <= smallest * 1.01]
    point, change = max(peers, key=lambda pair: (_second(place, pair[0]), pair[0].label))
    return Choice(place, point, figure, change, _tied(place, point, figure, known))


def _second(place: Place, point: Point) -> float:
    """What decides between equal sizes: answer accuracy, which is finer than most scores."""
    interval = place.mean(point, "accuracy" if "accuracy" in point.values else "score")
    return interval.mean if interval else 0.0


def _tied(place: Place, best: Point, figure: str, known: Sequence[tuple[Point, Interval]]) -> tuple[str, ...]:
    found = []
    for other, _ in known:
        change = place.versus(best, other, figure) if other is not best and asked(other) == asked(best) else None
        if change is not None and change.low <= 0:
            found.append(other.label)
    return tuple(found)


def headline(choices: Sequence[Choice]) -> str:
    """Return the answer in one sentence."""
    chosen = [c for c in choices if c.point is not None]
    if not choices:
        return "Nothing was generated or fed for real: there is no workload to choose a cache for."
    if not chosen:
        where = "" if len(choices) == 1 else f" in any of {len(choices)} workloads"
        return f"No compressed cache held the score within {TOLERANCE:g} of the full cache{where}: keep the full cache."
    if len(choices) == 1:
        return f"For {choices[0].place.model} and this workload {_run(chosen[0])}."
    counts = Counter(c.point.label for c in chosen if c.point)
    best, often = counts.most_common(1)[0]
    mine = [c for c in chosen if c.point and c.point.label == best]
    kept = sorted(100 * (c.point.retention or 0.0) for c in mine if c.point)
    reach = f"{kept[0]:.3g} %" if kept[0] == kept[-1] else f"{kept[0]:.3g} to {kept[-1]:.3g} %"
    worst = min(mine, key=lambda c: c.change.mean if c.change else 0.0)
    saved = sorted(100 * (c.point.saved or 0.0) for c in mine if c.point)
    worth = f"{saved[0]:.0f} %" if round(saved[0]) == round(saved[-1]) else f"{saved[0]:.0f} to {saved[-1]:.0f} %"
    cost_of = cost(worst.change, len(worst.place.samples)) if worst.change else ""
    models = {c.place.model for c in choices}
    who = f"For {next(iter(models))}" if len(models) == 1 else f"Over {len(models)} models"
    return (
        f"{who} run {best} at {reach} of the entries, by workload: it is the smallest that holds the score in "
        f"{often} of {counted(len(choices), 'workload')}, saves {worth} of the KV cache there and, at worst, {cost_of}{_ties(mine)}."
    )


def _ties(chosen: Sequence[Choice]) -> str:
    """Name what is not told apart from the recommended one: to run it instead is as good an answer."""
    counts = Counter(label for choice in chosen for label in choice.tied)
    named = [label if n == len(chosen) else f"{label} in {n} of {len(chosen)}" for label, n in counts.most_common()]
    return f"; not told apart from it there: {', '.join(named)}" if named else ""


def _run(choice: Choice) -> str:
    point, change = choice.point, choice.change
    assert point is not None
    assert change is not None
    return (
        f"run {point.label} at {100 * (point.retention or 0.0):.3g} % of the entries: it saves "
        f"{100 * (point.saved or 0.0):.1f} % of the KV cache and {cost(change, len(choice.place.samples))} ({FIGURES[choice.figure][1]})"
        f"{_ties([choice])}"
    )


def details(choices: Sequence[Choice]) -> list[str]:
    """Return what the answer rests on."""
    lines = [
        f"the choice per workload: the smallest cache whose score, by its 95 % interval, is not more than {TOLERANCE:g} below "
        "the full cache, at retentions that all compared methods were run at"
    ]
    few = [c for c in choices if c.point and c.change and not c.change.low >= -TOLERANCE]
    if few:
        where = "" if len(choices) == 1 else f"in {len(few)} of {len(choices)} workloads "
        lines.append(f"{where}there are too few prompts to show that: it is the smallest that lost nothing on them")
    left = [c for c in choices if c.point is None]
    if left and len(left) < len(choices):
        lines.append(f"in {len(left)} of {len(choices)} workloads no cache that was run is such a one")
    few = [c for c in choices if len(c.place.samples) < MIN_PROMPTS]
    if few:
        least = min(len(c.place.samples) for c in few)
        have = "has" if len(few) == 1 else "have"
        lines.append(
            f"{counted(len(few), 'workload')} {have} fewer than {MIN_PROMPTS} prompts (as few as {least}): a first look"
        )
    return lines
